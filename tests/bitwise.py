"""The comparison of bits by the name that scripts outside this repository know."""

from benchmarks.testing.bitwise import assert_same_tensors, assert_same_training

__all__ = ["assert_same_tensors", "assert_same_training"]
