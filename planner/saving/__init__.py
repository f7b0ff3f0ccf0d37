"""Plans as files: written completely or not at all, and trusted only after checks."""
