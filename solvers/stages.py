"""Stages: the runs between two first runs, as Checkmate and MOCCASIN divide a step.

Stage ``t`` ends with the first run of operator ``t``. In both papers a stage runs each
operator at most once, and in base order: schedules of this form are the *staged class*
here. It is a subset of the schedules whose first runs keep the base order, so its
optimum is not a bound for those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .retention_plan import base_fronts
from .schedule import Schedule


def stages_of(schedule: Schedule) -> list[list[int]]:
    """Return what each stage recomputes, ascending, for the nearest staged schedule.

    The first runs of ``schedule`` are in base order.
    """
    fronts = base_fronts(schedule)
    again: list[set[int]] = [set() for _ in range(max(schedule.order, default=-1) + 1)]
    for v, front in zip(schedule.order, fronts, strict=True):
        if v != front and front < len(again):
            again[front].add(v)
    return [sorted(stage) for stage in again]


def order_of(stages: Sequence[Iterable[int]]) -> list[int]:
    """Return the runs of a staged schedule: those of each stage, then its first run."""
    return [v for t, again in enumerate(stages) for v in (*sorted(again), t)]


def is_staged(schedule: Schedule) -> bool:
    """Whether ``schedule`` is in the staged class."""
    return tuple(order_of(stages_of(schedule))) == schedule.order
