"""Tables of what ran: every failure, eager's noise, and whose measured points beat ours."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.compare.executed import (
    beating,
    executed_facts,
    executed_part,
    executed_summary,
    failed_rows,
    measured_table,
    ran,
    was_executed,
)
from planner.comparing.comparison import Comparison
from planner.comparison_record import ComparisonRow, MeasuredStep


def step(peak_bytes: int, low: float, ratio: float, high: float, **others: object) -> MeasuredStep:
    found = MeasuredStep(
        peak_bytes=peak_bytes,
        step_us=100 * ratio,
        eager_us=100.0,
        ratio=ratio,
        quartiles=(low, high),
        num_pairs=4,
        bits="equal",
    )
    return replace(found, **others)  # type: ignore[arg-type]


def row(strategy: str, budget: int | None, measured: MeasuredStep | None) -> ComparisonRow:
    return ComparisonRow(
        strategy=strategy,
        budget="" if budget is None else f"{budget}B",
        budget_bytes=budget,
        fits=None if budget is None else True,
        predicted_peak_bytes=8_000_000,
        predicted_step_us=120.0,
        overhead=0.2,
        measured=measured,
    )


def peer(name: str, measured: MeasuredStep | None, error: str = "") -> ComparisonRow:
    return ComparisonRow(strategy=name, kind="peer", measured=measured, error=error)


EAGER = step(10_000_000, 0.98, 1.0, 1.03)
OURS = row("auto", 8_000_000, step(8_000_000, 1.10, 1.15, 1.20))


def comparison(*rows: ComparisonRow, eager: MeasuredStep | None = EAGER) -> Comparison:
    return Comparison(
        model="tiny",
        rows=rows,
        bounds=(),
        baseline_peak_bytes=10_000_000,
        baseline_step_us=100.0,
        least_bytes=4_000_000,
        least_bound_bytes=4_000_000,
        eager=eager,
        eager_error="" if eager else "RuntimeError when it ran: no room",
        device="one core of a table",
        measured_on="a processor",
        num_threads=1,
        dtype="float32",
        autocast="",
        optimizer="adamw",
        repeats=4,
        cost_model="roofline",
        fingerprint="0",
        seed=0,
    )


def test_figures_carry_the_machine_that_they_ran_on() -> None:
    """Not the one that the cost model is of."""
    first = executed_facts(comparison(OURS))[0]
    assert first.startswith("a processor, 1 thread(s), float32, adamw, 4 pairs asked for")
    assert "one core of a table" not in first


def test_eager_beside_itself_has_a_line() -> None:
    """Its peak and the quartiles of its ratio, which are the machine's noise."""
    lines = executed_facts(comparison(OURS))
    assert "beside itself 1.000 (0.980 to 1.030, 4 pairs)" in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("quartiles", "words"),
    [((0.85, 1.02), "differs by more than 10%"), ((0.92, 0.97), "on one side of 1")],
)
def test_a_busy_machine_is_said(quartiles: tuple[float, float], words: str) -> None:
    """Spread and one-sided figures of eager beside itself are warned of."""
    lines = executed_facts(comparison(OURS, eager=replace(EAGER, quartiles=quartiles)))
    assert words in lines[-1]


def test_eager_that_failed_is_said_and_nothing_reads_nan() -> None:
    """Schedules ran alone then, so that they have no ratio."""
    alone = step(8_000_000, math.nan, math.nan, math.nan, eager_us=math.nan, num_pairs=0)
    words = executed_part(comparison(row("auto", 8_000_000, alone), eager=None))
    assert "**eager steps failed**: RuntimeError when it ran: no room" in words
    assert "not timed" in words
    assert "nan" not in words


def test_every_row_that_was_to_run_and_did_not_is_listed() -> None:
    """Schedules and peers, with their errors; rows over their budget were never to run."""
    whole = comparison(
        OURS,
        replace(row("dtr", 8_000_000, None), error="RuntimeError when it ran: mm"),
        replace(row("rotor", 7_000_000, None), fits=False),
        peer("compile_budget_0.4", None, "RuntimeError when it ran: inductor"),
    )
    assert [r.strategy for r in failed_rows(whole)] == ["dtr", "compile_budget_0.4"]
    words = executed_part(whole)
    assert "| schedule | dtr | 80% | RuntimeError when it ran: mm |" in words
    assert "| peer | compile_budget_0.4 |  | RuntimeError when it ran: inductor |" in words


def test_a_comparison_that_ran_nothing_has_no_failures() -> None:
    """Its rows have no measured figures because none were asked for."""
    quiet = replace(comparison(row("dtr", 8_000_000, None)), eager=None, eager_error="")
    assert not was_executed(quiet)
    assert failed_rows(quiet) == []
    assert executed_summary({"tiny": quiet}) == ""


def test_a_schedule_has_one_line_however_many_budgets_it_is_for() -> None:
    """Its budgets stand in that line; a row over its budget adds none."""
    found = step(7_000_000, 1.2, 1.3, 1.4)
    whole = comparison(
        row("dtr", 8_000_000, found),
        row("dtr", 9_000_000, found),
        replace(row("dtr", 6_000_000, found), fits=False),
        row("dtr", None, found),
        row("dtr", 10_000_000, step(9_000_000, 1.0, 1.1, 1.2)),
        peer("checkpoint_sqrt", step(8_000_000, 1.2, 1.3, 1.4, bits="WRONG")),
    )
    assert measured_table(whole).splitlines()[2:] == [
        "| dtr | 100% | 8.0 MB | 9.0 MB | 1.200 | 1.100 (1.000 to 1.200) | equal |",
        "|  | 80%, 90%, own choice | 8.0 MB | 7.0 MB | 1.200 | 1.300 (1.200 to 1.400) | equal |",
        "| checkpoint_sqrt | peer |  | 8.0 MB |  | 1.300 (1.200 to 1.400) | **WRONG** |",
    ]


def test_a_rival_beats_ours_only_beyond_noise() -> None:
    """Less memory and separate quartiles; overlapping ones are noise; more memory is neither."""
    whole = comparison(
        OURS,
        row("beyond", 8_000_000, step(8_000_000, 1.00, 1.05, 1.09)),
        row("noise", 8_000_000, step(7_900_000, 1.05, 1.12, 1.16)),
        row("larger", 9_000_000, step(8_100_000, 1.00, 1.05, 1.09)),
        row("slower", 8_000_000, step(7_000_000, 1.30, 1.35, 1.40)),
        row("same", 8_000_000, OURS.measured),
        peer("quick", step(7_000_000, 1.0, 1.01, 1.02, bits="WRONG")),
    )
    beat, noise = beating(whole, ran(whole))
    assert [one.name for one in beat] == ["beyond", "peer quick (WRONG)"]
    assert [one.name for one in noise] == ["noise"]
    assert executed_summary({"tiny": whole}).splitlines()[-1] == (
        "| tiny | 1: beyond at 8.0 MB | 1: noise at 7.9 MB | 1: peer quick (WRONG) at 7.0 MB |"
    )


def test_a_rival_within_our_budget_may_need_a_little_more_than_we_do() -> None:
    """Both were asked to fit in 8.0 MB; at another budget it would be another point."""
    quick = step(8_000_000, 1.00, 1.05, 1.09)
    ours = row("auto", 8_000_000, step(7_900_000, 1.10, 1.15, 1.20))
    whole = comparison(ours, row("rotor", 8_000_000, quick), row("dtr", 8_500_000, quick))
    beat, noise = beating(whole, ran(whole))
    assert ([one.name for one in beat], noise) == (["rotor"], [])


def test_a_point_that_a_plan_of_ours_is_as_good_as_beats_nothing() -> None:
    """Another row of ours is slower than it, be it the very same schedule or not."""
    quick = step(7_000_000, 1.00, 1.01, 1.02)
    whole = comparison(
        OURS,
        row("auto", 7_500_000, quick),
        row("dtr", 7_500_000, quick),
        row("rotor", 7_500_000, step(7_100_000, 1.01, 1.02, 1.03)),
    )
    assert beating(whole, ran(whole)) == ([], [])


def test_the_summary_counts_bits_peaks_and_what_is_over_its_budget() -> None:
    """Each distinct schedule once: two share one run here; both were predicted at 1.2."""
    over = step(8_100_000, 1.1, 1.2, 1.3, bits="different")
    whole = comparison(
        OURS, row("same", 8_000_000, OURS.measured), row("dtr", 8_000_000, over), peer("x", None)
    )
    line = executed_summary({"tiny": whole}).splitlines()[2]
    assert line == (
        "| tiny | 1.000 (0.980 to 1.030) | 2 | 1 equal, 1 different | +100000 B | 1 | 1 | "
        "2.5, 5.0, 5.0 |"
    )
    assert "8.1 MB **over**" in measured_table(whole)
