"""Talking to one model, or to two side by side, in a terminal or through a pipe."""
