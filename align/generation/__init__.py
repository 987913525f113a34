"""Batched sampling with shared prompts, and scoring by a reward model."""
