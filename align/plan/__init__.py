"""What a recipe will need before a cent is spent: memory, time, disk, downloads. Light: no torch."""
