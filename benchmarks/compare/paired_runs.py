"""Others' schedules in turn with ours at their own peak.

In a comparison each schedule runs in turn with eager, a few pairs, minutes apart from
the others. On a shared machine, a schedule may then look faster although it is slower.
This module decides: the other strategy's schedule at the same budget and our plan at that
schedule's own peak run in turn with each other. Both are made again, because a
comparison's file has figures but no schedules.

This is done for the strategies with which ours is compared at their own peak
(:mod:`.match_peak_and_time`), and for every point that measured better than ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from scipy.stats import binom

from planner.comparing.budgets import NamedBudget
from planner.comparing.comparison import Comparison
from planner.comparing.execution.runner import said
from planner.comparing.predict import Predictor
from planner.comparison_record import ComparisonRow
from planner.measuring.measure import PairedTiming
from solvers.schedule import Schedule
from solvers.strategies.registry import Registry
from solvers.strategies.solved import AUTO

from ..plan_runs import markdown
from .executed import (
    Ran,
    beating,
    ran,
)
from .match_peak_and_time import RIVALS
from .signs import (
    mb,
    one_line,
)

BEYOND_NOISE = "measured better, beyond noise"
WITHIN_NOISE = "measured better, within noise"
OWN_PEAK = "its own peak"

CONFIDENCE = 0.95
NUM_PAIRS = 20
"""Pairs of a step of ours and one of the other."""

LEGEND = (
    "The strategy at the same budget and ours at the peak of what it proposed, run in turn with "
    "each other: at its own choice, and wherever it measured better than one of our rows. Whose "
    f"takes less is said where the {CONFIDENCE:.0%} interval of the median of ours / its leaves "
    f"out 1; by chance it does so in {1 - CONFIDENCE:.0%} of the lines. *: not the schedule that "
    "was seen, by its predictions: solves are cut by the clock, and times may be profiled anew."
)

InTurn = Callable[[Schedule, Schedule], PairedTiming]


class WhoseTime(StrEnum):
    """Whose schedule takes less time."""

    OURS_LESS = "ours_less"
    NO_DIFFERENCE = "no_difference"  # is seen
    THEIRS_LESS = "theirs_less"
    SAME_SCHEDULE = "same_schedule"  # so that nothing ran
    NOT_RUN = "not_run"  # see the error


_WORDS = {
    WhoseTime.OURS_LESS: "ours takes less",
    WhoseTime.NO_DIFFERENCE: "no difference seen",
    WhoseTime.THEIRS_LESS: "theirs takes less",
    WhoseTime.SAME_SCHEDULE: "the same schedule",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRun:
    """A schedule of another strategy in turn with ours at its own peak.

    Parameters
    ----------
    strategy, budget_bytes
        The other strategy, and its requested budget; ``None`` for its own choice.
    why
        :data:`BEYOND_NOISE`, :data:`WITHIN_NOISE` or :data:`OWN_PEAK`.
    seen_peak_bytes, seen_ratio
        Its measured peak and time / eager in the comparison.
    same_as_seen
        Whether it proposed the same again, in predicted peak and time.
    peak_bytes, our_peak_bytes
        Predicted peaks of the schedules that ran here.
    predicted_ratio, ratio, interval
        Time of ours over that of the other: predicted, the measured median, and
        its interval by order statistics at the level :data:`CONFIDENCE`.
    num_pairs
        Number of pairs of steps.
    same_schedule
        Whether both have the same schedule.
    error
        Why nothing ran.
    """

    strategy: str
    budget_bytes: int | None
    why: str
    seen_peak_bytes: int
    seen_ratio: float
    same_as_seen: bool = True
    peak_bytes: int | None = None
    our_peak_bytes: int | None = None
    predicted_ratio: float | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    num_pairs: int = 0
    same_schedule: bool = False
    error: str = ""

    @property
    def verdict(self) -> WhoseTime:
        """What the interval says."""
        if self.same_schedule:
            return WhoseTime.SAME_SCHEDULE
        if self.interval is None:
            return WhoseTime.NOT_RUN
        low, high = self.interval
        if high < 1:
            return WhoseTime.OURS_LESS
        return WhoseTime.THEIRS_LESS if low > 1 else WhoseTime.NO_DIFFERENCE

    @property
    def words(self) -> str:
        """The verdict in words, or why nothing ran."""
        return _WORDS.get(self.verdict, self.error)


def runs_to_pair(comparison: Comparison) -> list[tuple[Ran, str]]:
    """The strategies' schedules that are run again, and why."""
    found = ran(comparison)
    own = [one for one in found if one.row.strategy in RIVALS and one.by_itself and one.timed]
    beat, noise = beating(comparison, found)
    asked = [(one, BEYOND_NOISE) for one in beat] + [(one, WITHIN_NOISE) for one in noise]
    asked += [(one, OWN_PEAK) for one in own if one not in (*beat, *noise)]
    return [(one, why) for one, why in asked if one.row.kind == "strategy"]


def paired_runs(
    comparison: Comparison,
    predictor: Predictor,
    registry: Registry,
    in_turn: InTurn,
    say: Callable[[str], None],
) -> list[PairedRun]:
    """A pair for each of the :func:`runs_to_pair`.

    Parameters
    ----------
    predictor
        The predictor of the same step; it solves ours.
    registry
        Has the strategies of the comparison.
    in_turn
        Runs the other's schedule and ours in turn.
    say
        Is told which one is next.

    Raises
    ------
    ValueError
        When the predictor is for a step with other operators or sizes.
    """
    if predictor.graph.fingerprint != comparison.fingerprint:
        raise ValueError(
            f"the comparison is of step {comparison.fingerprint}, and the step to run is "
            f"{predictor.graph.fingerprint}: compare again"
        )
    asked = runs_to_pair(comparison)
    found = []
    for i, (one, why) in enumerate(asked):
        say(f"in turn with ours {i + 1}/{len(asked)}: {one.name}")
        pair = PairedRun(
            strategy=one.row.strategy,
            budget_bytes=one.row.budget_bytes,
            why=why,
            seen_peak_bytes=one.measured.peak_bytes,
            seen_ratio=one.measured.ratio,
        )
        found.append(_run(pair, one.row, predictor, registry, in_turn))
    return found


def _run(
    pair: PairedRun, seen: ComparisonRow, predictor: Predictor, registry: Registry, in_turn: InTurn
) -> PairedRun:
    if pair.strategy not in registry:
        return replace(pair, error=f"there is no strategy {pair.strategy} here")
    budget = pair.budget_bytes
    asked = None if budget is None else NamedBudget(label=seen.budget, num_bytes=budget)
    theirs = predictor.predicted(registry[pair.strategy], asked)
    if theirs.schedule is None:
        return replace(pair, error=theirs.row.error)
    peak_bytes, theirs_us = theirs.row.predicted_peak_bytes, theirs.row.predicted_step_us
    assert peak_bytes is not None
    assert theirs_us is not None
    same = (peak_bytes, theirs_us) == (seen.predicted_peak_bytes, seen.predicted_step_us)
    pair = replace(pair, peak_bytes=peak_bytes, same_as_seen=same)
    ours = predictor.predicted(AUTO, NamedBudget(label=f"{peak_bytes}B", num_bytes=peak_bytes))
    if ours.schedule is None:
        return replace(pair, error=ours.row.error)
    assert ours.row.predicted_step_us is not None
    pair = replace(
        pair,
        our_peak_bytes=ours.row.predicted_peak_bytes,
        predicted_ratio=ours.row.predicted_step_us / theirs_us,
    )
    if ours.schedule == theirs.schedule:
        return replace(pair, same_schedule=True)
    try:
        timing = in_turn(theirs.schedule, ours.schedule)
    # An error in one pair of schedules does not affect the others.
    except Exception as error:  # noqa: BLE001
        return replace(pair, error=said(error, "when they ran"))
    return replace(
        pair,
        ratio=timing.ratio,
        interval=median_interval(timing.ratios),
        num_pairs=len(timing.ratios),
    )


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval for the median by order statistics, without assuming a distribution.

    With too few values for that confidence it is their whole range.

    Examples
    --------
    >>> median_interval([float(n) for n in range(1, 21)])
    (6.0, 15.0)
    """
    ordered = sorted(values)
    outside = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    first = max(0, outside - 1)
    return ordered[first], ordered[-1 - first]


def paired_runs_table(found: Mapping[str, Sequence[PairedRun]]) -> str:
    """A line for each pair of each model; empty if there is none."""
    header = [
        "model",
        "strategy",
        "why",
        "seen: peak, time / eager",
        "its peak",
        "our peak",
        "ours / its time predicted",
        "measured (interval, pairs)",
        "verdict",
    ]
    lines = [[model, *_line(one)] for model, some in found.items() for one in some]
    return markdown(header, lines) if lines else ""


def _line(one: PairedRun) -> list[str]:
    measured = ""
    if one.ratio is not None and one.interval is not None:
        low, high = one.interval
        measured = f"{one.ratio:.3f} ({low:.3f} to {high:.3f}, {one.num_pairs})"
    words = one_line(one.words)
    return [
        one.strategy,
        one.why,
        f"{mb(one.seen_peak_bytes)}, {one.seen_ratio:.3f}",
        mb(one.peak_bytes) + ("" if one.same_as_seen else "\\*"),
        mb(one.our_peak_bytes),
        "" if one.predicted_ratio is None else f"{one.predicted_ratio:.3f}",
        measured,
        f"**{words}**" if one.verdict is WhoseTime.THEIRS_LESS else words,
    ]
