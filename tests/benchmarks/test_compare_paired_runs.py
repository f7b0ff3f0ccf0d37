"""What measured better than ours, in turn with ours: who is asked again, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.compare.paired_runs import (
    BEYOND_NOISE,
    OWN_PEAK,
    WITHIN_NOISE,
    PairedRun,
    WhoseTime,
    median_interval,
    paired_runs,
    paired_runs_table,
    runs_to_pair,
)
from planner.comparing.comparison import Comparison
from planner.comparison_record import ComparisonRow, MeasuredStep
from planner.measuring.measure import PairedTiming
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES
from tests.benchmarks.test_compare_executed import peer, step
from tests.benchmarks.test_compare_solve_at_peaks import (
    GRAPH,
    comparison,
    predictor,
    row,
)
from tests.solvers.strategy_graphs import unit_chain


def ran_row(
    strategy: str, peak_bytes: int, measured: MeasuredStep | None, budget: int | None = None
) -> ComparisonRow:
    return replace(row(strategy, peak_bytes, 9.0, budget), measured=measured)


def seen(rival: str, budget: int | None = None) -> Comparison:
    """A comparison in which a rival measured better than ours with less memory."""
    return comparison(
        ran_row("auto", 90, step(90, 1.20, 1.25, 1.30), 90),
        ran_row(rival, 80, step(80, 1.00, 1.05, 1.10), budget),
    )


def timed(ours_us: float, spread: float = 0.0) -> Callable[[Schedule, Schedule], PairedTiming]:
    """Theirs takes 100 µs, ours what is said, more and less by the spread."""

    def in_turn(theirs: Schedule, ours: Schedule) -> PairedTiming:
        return PairedTiming(
            first_us=(100.0,) * 4,
            second_us=(ours_us - spread, ours_us - spread, ours_us + spread, ours_us + spread),
        )

    return in_turn


def silent(words: str) -> None:
    pass


def test_who_is_asked_again() -> None:
    """What measured better, beyond noise and within it, and rivals at their own choice; no peer."""
    found = runs_to_pair(
        comparison(
            ran_row("auto", 90, step(90, 1.20, 1.25, 1.30), 90),
            ran_row("within", 90, step(90, 1.00, 1.20, 1.40)),
            ran_row("beyond", 80, step(80, 1.00, 1.05, 1.10)),
            ran_row("worse", 90, step(90, 1.30, 1.35, 1.40)),
            ran_row("uniform_sqrt", 90, step(90, 1.35, 1.40, 1.45)),
            ran_row("transformers_per_layer", 90, step(90, 1.30, 1.40, 1.50), 90),
            peer("tool", step(70, 0.9, 0.95, 1.0)),
        )
    )
    assert [(one.name, why) for one, why in found] == [
        ("beyond", BEYOND_NOISE),
        ("within", WITHIN_NOISE),
        ("uniform_sqrt", OWN_PEAK),
    ]


def test_a_rival_at_our_budget_is_asked_even_with_a_little_more_memory() -> None:
    """Both fit, and it took less."""
    (found,) = runs_to_pair(
        comparison(
            ran_row("auto", 89, step(89, 1.20, 1.25, 1.30), 91),
            ran_row("rotor", 90, step(90, 1.00, 1.05, 1.10), 91),
            ran_row("dtr", 90, step(90, 1.00, 1.05, 1.10)),
        )
    )
    assert (found[0].name, found[1]) == ("rotor", BEYOND_NOISE)


def test_the_interval_of_a_median() -> None:
    """Of 20 values the sixth and the fifteenth; of two the whole range."""
    values = [1 + n / 100 for n in range(20)]
    assert median_interval(values) == (values[5], values[14])
    assert median_interval([2.0, 1.0]) == (1.0, 2.0)


def test_ours_runs_at_the_peak_of_what_the_other_proposes() -> None:
    """Two schedules of the graph, theirs first; predicted figures are their replays'."""
    ran: list[tuple[Schedule, Schedule]] = []
    said: list[str] = []

    def in_turn(theirs: Schedule, ours: Schedule) -> PairedTiming:
        ran.append((theirs, ours))
        return timed(90.0)(theirs, ours)

    (found,) = paired_runs(
        seen("transformers_per_layer"), predictor(), STRATEGIES, in_turn, said.append
    )
    ((theirs, ours),) = ([replay(GRAPH, schedule) for schedule in both] for both in ran)
    assert said == ["in turn with ours 1/1: transformers_per_layer"]
    assert (found.peak_bytes, found.our_peak_bytes) == (theirs.peak_bytes, ours.peak_bytes)
    assert ours.peak_bytes <= theirs.peak_bytes
    assert found.predicted_ratio == pytest.approx(ours.cost_ns / theirs.cost_ns)
    assert found.predicted_ratio < 1
    assert (found.ratio, found.num_pairs) == (pytest.approx(0.9), 4)
    assert (found.seen_peak_bytes, found.seen_ratio, found.why) == (80, 1.05, BEYOND_NOISE)
    assert not found.same_as_seen  # the comparison's figures are made up


@pytest.mark.parametrize(
    ("ours_us", "spread", "verdict"),
    [
        (90.0, 5.0, WhoseTime.OURS_LESS),
        (101.0, 2.0, WhoseTime.NO_DIFFERENCE),
        (110.0, 5.0, WhoseTime.THEIRS_LESS),
    ],
)
def test_the_verdict_is_of_the_interval(ours_us: float, spread: float, verdict: WhoseTime) -> None:
    """On one side of 1 both, or not."""
    (found,) = paired_runs(
        seen("transformers_per_layer"), predictor(), STRATEGIES, timed(ours_us, spread), silent
    )
    assert found.verdict is verdict


def test_a_strategy_is_asked_at_the_budget_that_it_was_asked_at() -> None:
    """With all the memory both recompute nothing: one schedule, and nothing to run."""

    def never(theirs: Schedule, ours: Schedule) -> PairedTiming:
        raise AssertionError("nothing to run")

    (found,) = paired_runs(seen("rotor", 1000), predictor(), STRATEGIES, never, silent)
    assert (found.verdict, found.budget_bytes) == (WhoseTime.SAME_SCHEDULE, 1000)


def test_what_cannot_run_is_said() -> None:
    """Nothing fits, or the strategy is not known here."""
    before = seen("rotor", 1)
    ours, theirs = before.rows
    before = replace(before, rows=(ours, replace(theirs, fits=True)))  # it fitted then
    (found,) = paired_runs(before, predictor(), STRATEGIES, timed(1.0), silent)
    assert found.verdict is WhoseTime.NOT_RUN
    assert "1 bytes" in found.error
    (found,) = paired_runs(seen("my own"), predictor(), STRATEGIES, timed(1.0), silent)
    assert found.error == "there is no strategy my own here"


def test_another_step_is_refused() -> None:
    """Its schedules are others."""
    other = replace(comparison(), fingerprint=unit_chain(3).fingerprint)
    with pytest.raises(ValueError, match="compare again"):
        paired_runs(other, predictor(), STRATEGIES, timed(1.0), silent)


def test_the_table() -> None:
    """A line for each; nothing without any."""
    pair = PairedRun(
        strategy="dtr",
        budget_bytes=9_000_000,
        seen_peak_bytes=8_000_000,
        seen_ratio=1.05,
        why=BEYOND_NOISE,
        same_as_seen=False,
        peak_bytes=8_100_000,
        our_peak_bytes=8_000_000,
        predicted_ratio=0.95,
        ratio=1.02,
        interval=(1.01, 1.03),
        num_pairs=20,
    )
    table = paired_runs_table({"gpt2": [pair], "bert": []})
    assert (
        "| gpt2 | dtr | measured better, beyond noise | 8.0 MB, 1.050 | 8.1 MB\\* | 8.0 MB | "
        "0.950 | 1.020 (1.010 to 1.030, 20) | **theirs takes less** |" in table
    )
    assert paired_runs_table({"bert": []}) == ""


def test_what_they_run_into_is_said() -> None:
    """And the others still run."""

    def no_room(theirs: Schedule, ours: Schedule) -> PairedTiming:
        raise RuntimeError("no room")

    (found,) = paired_runs(seen("transformers_per_layer"), predictor(), STRATEGIES, no_room, silent)
    assert found.words == "RuntimeError when they ran: no room"
