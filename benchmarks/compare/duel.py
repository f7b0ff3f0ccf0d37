"""Points of others that measured better than ours, run again in turn with ours.

In a comparison each schedule runs in turn with eager, a few pairs, minutes apart from
the others; on a shared machine a schedule may then look better than one that it is
slower than. Whether it is better is asked here: the other's schedule at the same
budget and our plan at that schedule's own peak run in turn with each other. Both are
made anew, since a comparison's file has figures and no schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from planner.comparing.budgets import NamedBudget
from planner.comparing.comparison import Comparison
from planner.comparing.predict import Predictor
from planner.measuring.measure import PairedTiming, quartiles
from solvers.schedule import Schedule
from solvers.strategies.registry import Registry
from solvers.strategies.solved import AUTO

from ..plan_runs import markdown
from .executed import Ran, beating, ran
from .signs import mb, one_line

OURS_LESS = "ours takes less"
WITHIN_NOISE = "within noise"
THEIRS_LESS = "theirs takes less"
SAME = "the same schedule"

LEGEND = (
    "Points of strategies that measured better than one of our rows, beyond noise or within it, "
    "asked again: the strategy at the same budget, ours at the peak of what it proposed, and the "
    "two run in turn. Whose takes less is said where the quartiles of ours / its leave out 1."
)

InTurn = Callable[[Schedule, Schedule], PairedTiming]


@dataclass(frozen=True, slots=True, kw_only=True)
class Duel:
    """A schedule of another strategy in turn with ours at its own peak.

    Parameters
    ----------
    strategy, budget_bytes
        The other one, and what it was asked for; ``None`` for its own choice.
    seen_peak_bytes, seen_ratio
        Its measured peak and time / eager in the comparison, where it looked better.
    beyond_noise
        Whether it did so beyond the quartiles there.
    peak_bytes, our_peak_bytes
        Predicted, of the schedules that ran here.
    predicted_ratio, ratio, quartiles
        Time of ours over that of the other, predicted and measured.
    num_pairs
        Of steps.
    verdict
        One of :data:`OURS_LESS`, :data:`WITHIN_NOISE`, :data:`THEIRS_LESS`,
        :data:`SAME`, or why nothing ran.
    """

    strategy: str
    budget_bytes: int | None
    seen_peak_bytes: int
    seen_ratio: float
    beyond_noise: bool
    peak_bytes: int | None = None
    our_peak_bytes: int | None = None
    predicted_ratio: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    num_pairs: int = 0
    verdict: str = ""


def rivals_that_looked_better(comparison: Comparison) -> list[tuple[Ran, bool]]:
    """The strategies' points that measured better than ours, and whether beyond noise."""
    beat, noise = beating(comparison, ran(comparison))
    both = [(one, True) for one in beat] + [(one, False) for one in noise]
    return [(one, beyond) for one, beyond in both if one.row.kind == "strategy"]


def duels(
    comparison: Comparison,
    predictor: Predictor,
    registry: Registry,
    in_turn: InTurn,
    say: Callable[[str], None],
) -> list[Duel]:
    """A duel for each point that looked better than ours.

    Parameters
    ----------
    predictor
        Of the same step; it solves ours.
    registry
        Has the strategies of the comparison.
    in_turn
        Runs the other's schedule and ours in turn.
    say
        Is told which one is next.

    Raises
    ------
    ValueError
        When the predictor is of a step of other operators or sizes.
    """
    if predictor.graph.fingerprint != comparison.fingerprint:
        raise ValueError(
            f"the comparison is of step {comparison.fingerprint}, and the step to run is "
            f"{predictor.graph.fingerprint}: compare again"
        )
    rivals = rivals_that_looked_better(comparison)
    found = []
    for i, (rival, beyond_noise) in enumerate(rivals):
        say(f"in turn with ours {i + 1}/{len(rivals)}: {rival.name}")
        duel = Duel(
            strategy=rival.row.strategy,
            budget_bytes=rival.row.budget_bytes,
            seen_peak_bytes=rival.measured.peak_bytes,
            seen_ratio=rival.measured.ratio,
            beyond_noise=beyond_noise,
        )
        found.append(_run(duel, rival.row.budget, predictor, registry, in_turn))
    return found


def _run(duel: Duel, label: str, predictor: Predictor, registry: Registry, in_turn: InTurn) -> Duel:
    if duel.strategy not in registry:
        return replace(duel, verdict=f"there is no strategy {duel.strategy} here")
    asked = (
        None if duel.budget_bytes is None else NamedBudget(label=label, num_bytes=duel.budget_bytes)
    )
    theirs = predictor.predicted(registry[duel.strategy], asked)
    if theirs.schedule is None:
        return replace(duel, verdict=theirs.row.error)
    peak_bytes, theirs_us = theirs.row.predicted_peak_bytes, theirs.row.predicted_step_us
    assert peak_bytes is not None
    assert theirs_us is not None
    duel = replace(duel, peak_bytes=peak_bytes)
    ours = predictor.predicted(AUTO, NamedBudget(label=f"{peak_bytes}B", num_bytes=peak_bytes))
    if ours.schedule is None:
        return replace(duel, verdict=ours.row.error)
    assert ours.row.predicted_step_us is not None
    duel = replace(
        duel,
        our_peak_bytes=ours.row.predicted_peak_bytes,
        predicted_ratio=ours.row.predicted_step_us / theirs_us,
    )
    if ours.schedule == theirs.schedule:
        return replace(duel, verdict=SAME)
    timing = in_turn(theirs.schedule, ours.schedule)
    low, high = quartiles(timing.ratios)
    return replace(
        duel,
        ratio=timing.ratio,
        quartiles=(low, high),
        num_pairs=len(timing.ratios),
        verdict=OURS_LESS if high < 1 else THEIRS_LESS if low > 1 else WITHIN_NOISE,
    )


def duels_table(found: Mapping[str, Sequence[Duel]]) -> str:
    """A line for each duel of each model; nothing where there is none."""
    header = [
        "model",
        "strategy",
        "seen: peak, time / eager",
        "its peak",
        "our peak",
        "ours / its time predicted",
        "measured (quartiles, pairs)",
        "verdict",
    ]
    lines = [[model, *_line(one)] for model, some in found.items() for one in some]
    return markdown(header, lines) if lines else ""


def _line(one: Duel) -> list[str]:
    measured = ""
    if one.ratio is not None and one.quartiles is not None:
        low, high = one.quartiles
        measured = f"{one.ratio:.3f} ({low:.3f} to {high:.3f}, {one.num_pairs})"
    verdict = one_line(one.verdict)
    return [
        one.strategy,
        f"{mb(one.seen_peak_bytes)}, {one.seen_ratio:.3f}"
        + (" (beyond noise)" if one.beyond_noise else ""),
        mb(one.peak_bytes),
        mb(one.our_peak_bytes),
        "" if one.predicted_ratio is None else f"{one.predicted_ratio:.3f}",
        measured,
        f"**{verdict}**" if one.verdict == THEIRS_LESS else verdict,
    ]
