"""Everything that a training loop of the sweep changes between two steps."""

from __future__ import annotations

from . import moves_calls, moves_hooks, moves_objects, moves_parts, moves_read
from .loop_side import MOVES

__all__ = ["MOVES", "moves_calls", "moves_hooks", "moves_objects", "moves_parts", "moves_read"]
