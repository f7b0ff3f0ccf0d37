"""Answer for many shapes from few captures: ``estimate`` and ``max_batch``."""
