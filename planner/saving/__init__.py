"""Plans as files: written whole or not at all, and believed only after checking."""
