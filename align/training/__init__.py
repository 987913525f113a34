"""TRL's trainers over rows that are token ids already."""
