"""Steps in which modules stand for themselves, and steps that run for real."""
