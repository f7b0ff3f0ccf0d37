"""The best of what another tool can do, judged on a plan's own graph.

Every tool has a short list of settings (how many layers, which ones, whose outputs are
saved). Each becomes a schedule of the plan's graph, by the rules of
``solvers/strategies/segments.py``, and is replayed: so what the tool loses against the
plan is told by the same judge and the same costs.

Such a step runs in eager mode, which may hold more than the planned step does (a gradient
of the logits until its variable goes, say). By how much is known where nothing is
recomputed; as much is added to every peak, and the difference in time to every time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

from solvers.replay import replay
from solvers.schedule import Schedule

from ..plan_record import PlanRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that a tool can be told, and what it does then.

    Parameters
    ----------
    schedule
        Of the plan's graph.
    stack
        Names of all layers of which some are checkpointed, in forward order.
    layers
        Names of those that are.
    group_size
        How many consecutive layers are one checkpoint.
    attention_cores
        Whether only the attention cores run again, and no layer as a whole.
    saved_calls
        Calls whose outputs are saved although they lie in a checkpointed layer.
    cached_bytes
        What the tool holds during each run beyond what the schedule's replay does.
    """

    schedule: Schedule
    stack: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    group_size: int = 1
    attention_cores: bool = False
    saved_calls: tuple[str, ...] = ()
    cached_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A setting with its figures.

    Parameters
    ----------
    setting
        The setting.
    peak_bytes, step_us
        Of the step in eager mode.
    fits
        Whether the peak is within the budget less the headroom.
    """

    setting: Setting
    peak_bytes: int
    step_us: float
    fits: bool

    def better_than(self, other: Judged) -> bool:
        """Whether it fits where the other does not, or is faster; where none fits, smaller."""
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[bool, float, float]:
        if self.fits:
            return False, self.step_us, self.peak_bytes
        return True, self.peak_bytes, self.step_us


class Judge:
    """Replays settings on a plan's graph, and counts them."""

    def __init__(self, plan: PlanRecord) -> None:
        self.plan = plan
        self.num_judged = 0

    @cached_property
    def _eager(self) -> tuple[int, float]:
        """Bytes and microseconds that eager takes beyond the plan's graph."""
        keep_all = replay(self.plan.graph, Schedule.keep_all(self.plan.graph))
        return (
            max(0, self.plan.baseline_peak_bytes - keep_all.peak_bytes),
            self.plan.baseline_step_us - keep_all.cost_ns / 1e3,
        )

    def judge(self, setting: Setting) -> Judged:
        """Return a setting's figures."""
        self.num_judged += 1
        outcome = replay(self.plan.graph, setting.schedule)
        levels = zip_longest(outcome.memory_bytes, setting.cached_bytes, fillvalue=0)
        more_bytes, more_us = self._eager
        peak_bytes = max(map(sum, levels)) + more_bytes
        return Judged(
            setting=setting,
            peak_bytes=peak_bytes,
            step_us=outcome.cost_ns / 1e3 + more_us,
            fits=peak_bytes <= self.plan.budget_bytes - self.plan.headroom_bytes,
        )

    def best_of(self, families: Iterable[Iterable[Setting]]) -> Judged:
        """Return the fastest setting that fits; the one with the lowest peak where none does.

        Parameters
        ----------
        families
            Lists of settings, each from the one that takes the least time to the one that
            takes the most: a list is left at its first setting that fits.
        """
        best: Judged | None = None
        for family in families:
            for setting in family:
                found = self.judge(setting)
                if best is None or found.better_than(best):
                    best = found
                if found.fits:
                    break
        assert best is not None
        return best
