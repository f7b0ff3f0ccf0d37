"""Sweeps: many small steps that nobody chose by hand, each judged by the same rules."""
