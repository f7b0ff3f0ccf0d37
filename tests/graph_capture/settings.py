"""Numbers of a file that models read by other ways than by a global of their own."""

from __future__ import annotations

GAIN = 2.0
SHIFT = 0.5
SLOPE = 1.0
