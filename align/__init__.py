"""Post-training for Llama 3 and friends; see README.md. Python use: `align.config.load` and `align.runs`."""

__version__ = "0.1.0"
