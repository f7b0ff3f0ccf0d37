"""Measurements that take long. Not part of the wheel: run them from a checkout."""
