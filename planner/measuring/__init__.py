"""Measure real steps on the device: peaks, times, bits, and a plan's predictions."""
