"""How hard to search for a schedule, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

DEFAULT_GAP = 0.001
"""How near the least possible time a solve ends, unless it was asked for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions:
    """How hard to search for a schedule.

    Parameters
    ----------
    solver, time_limit_s, gap, seed, reorder
        As of :func:`planner.optimize`.
    workers
        Number of threads, for solvers that can use more than one.

    Raises
    ------
    ValueError
        When one is invalid.
    """

    solver: str = "auto"
    time_limit_s: float = 60.0
    gap: float = DEFAULT_GAP
    seed: int = 0
    reorder: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        if not _is_amount(self.time_limit_s):
            raise ValueError(f"time_limit_s must be finite and >= 0, got {self.time_limit_s!r}")
        if not _is_amount(self.gap):
            raise ValueError(f"gap must be finite and >= 0, got {self.gap!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if not isinstance(self.reorder, bool):
            raise ValueError(f"reorder must be True or False, got {self.reorder!r}")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise ValueError(f"workers must be a whole number from 1 on, got {self.workers!r}")


def _is_amount(value: object) -> bool:
    """Whether it is a finite number from 0 on."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
