"""Recipes: typed sections, loading with lines and origins, schema."""
