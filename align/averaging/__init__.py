"""Averages of models: members and their checks, factors of adapters, full weights."""
