"""Sweeps: many small steps that nobody chose by hand, all judged by the same rules."""
