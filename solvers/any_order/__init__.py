"""Beyond the base order: operators that may run earlier or later at no cost."""
