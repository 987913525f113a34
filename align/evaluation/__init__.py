"""Judges and statistics."""
