"""What slice refinement did, round by round: for lectures, plots and debugging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..schedule import Schedule
from .slicing import Slicing


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One relaxation that was solved, and what followed from it.

    Parameters
    ----------
    slicing
        Where the relaxation enforced memory.
    num_columns
        Its size.
    bound_ns
        What the relaxation proves: no schedule within the budget takes less
        time. It speaks of staged schedules only (``stages.py``) where
        ``slicing.staged``.
    schedule
        The relaxation's best solution as a schedule; it may exceed the budget.
    cost_ns, peak_bytes
        Of that schedule, by replay.
    best_bound_ns
        The highest bound so far, of the scope of ``slicing``.
    incumbent_ns
        Time of the best schedule known to fit when the round ended; ``None``
        as long as there is none.
    refined
        Where the next round will enforce memory; equal to ``slicing`` where
        nothing was left to add.
    elapsed_s
        Since the solve began.
    """

    slicing: Slicing
    num_columns: int
    bound_ns: int
    schedule: Schedule
    cost_ns: int
    peak_bytes: int
    best_bound_ns: int
    incumbent_ns: int | None
    refined: Slicing
    elapsed_s: float

    @property
    def new_slices(self) -> tuple[int, ...]:
        """Base positions at which memory is enforced from the next round on."""
        return tuple(sorted(self.refined.slices - self.slicing.slices))


Observe = Callable[[Round], None]
