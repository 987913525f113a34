"""Recipes of other tools (alignment-handbook, TRL, LLaMA-Factory, axolotl) as recipes of align. Light."""
