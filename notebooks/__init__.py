"""Four notebooks, and what executes them: ``python -m notebooks``."""
