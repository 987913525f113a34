"""Proximal policy optimization: rollout, scoring, advantage estimation and update, each a part of its own."""
