"""The comparison of record on a tiny model, and its tables."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.compare.__main__ import app, run_worker
from benchmarks.compare.folder import Found, read
from benchmarks.compare.match_peak_and_time import (
    MatchedRow,
    Wanted,
    match_peak_and_time,
)
from benchmarks.compare.signs import LEGEND, sign
from benchmarks.compare.solve_at_peaks import (
    SolvedAtPeak,
)
from benchmarks.compare.tables import (
    below_table,
    facts,
    matched_table,
    no_figures,
    predicted_table,
    report,
)
from benchmarks.compare.worker import Job
from graph_capture.cost_graph import CostGraph
from planner.comparing.comparison import Comparison
from planner.comparing.older_rows import with_outcome
from planner.comparison_record import BudgetBound, ComparisonRow, RowOutcome
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory
from solvers.portfolio import solve
from solvers.scopes import BoundScope
from tests.solvers.strategy_graphs import layered, unit_chain


def comparison(others_us: float) -> Comparison:
    """Two strategies at one budget: ours at 110 µs and another one."""
    row = ComparisonRow(
        strategy="auto",
        budget="50%",
        budget_bytes=500_000,
        fits=True,
        predicted_peak_bytes=500_000,
        predicted_step_us=110.0,
        overhead=0.1,
        gap=0.02,
        num_recomputed=3,
    )
    other = replace(
        row, strategy="uniform_sqrt", predicted_step_us=others_us, overhead=others_us / 100 - 1
    )
    return Comparison(
        model="tiny",
        rows=(other, row, replace(other, budget="", budget_bytes=None, fits=None)),
        bounds=(
            BudgetBound(
                budget="50%",
                budget_bytes=500_000,
                lower_bound_us=108.0,
                scope=BoundScope.BASE_ORDER,
            ),
        ),
        baseline_peak_bytes=1_000_000,
        baseline_step_us=100.0,
        least_bytes=400_000,
        least_bound_bytes=400_000,
        device="cpu",
        cost_model="roofline",
        fingerprint="0",
        seed=0,
    )


def cells(table: str) -> list[str]:
    """Of the only line of a table."""
    return [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]


def test_points_are_counted_once_however_many_rows_they_have() -> None:
    """Two rows of one schedule are one point; it is open where it takes less than ours."""
    open_point = cells(below_table({"tiny": comparison(105.0)}, {}))
    assert open_point[:7] == ["tiny", "1", "2 (0)", "1", "1", "–", "–"]
    assert open_point[7] == "not solved: uniform_sqrt at 0.5 MB, 5.000%"
    covered = cells(below_table({"tiny": comparison(130.0)}, {}))
    assert covered[3:] == ["1", "0", "–", "0", "–", "1 (none)", "2.00%"]


def test_a_row_over_its_budget_is_counted_as_one() -> None:
    """Its point counts all the same."""
    whole = comparison(105.0)
    rows = [replace(r, fits=False) if r.strategy != "auto" else r for r in whole.rows]
    assert cells(below_table({"tiny": replace(whole, rows=tuple(rows))}, {}))[2] == "2 (2)"


def test_a_point_that_settling_covers_is_not_below_ours() -> None:
    """Solved at its peak ours takes as little; what still takes more is named with both figures."""
    found = SolvedAtPeak(
        strategies=("uniform_sqrt",),
        peak_bytes=500_000,
        theirs_us=105.0,
        ours_peak_bytes=499_000,
        ours_us=105.0,
        bound_us=104.0,
    )
    line = cells(below_table({"tiny": comparison(105.0)}, {"tiny": [found]}))
    assert line[4:8] == ["1", "1 (0)", "0", "–"]
    same = replace(found, ours_peak_bytes=500_000)
    assert cells(below_table({"tiny": comparison(105.0)}, {"tiny": [same]}))[5] == "1 (1)"
    above = replace(found, ours_us=107.0, bound_us=None)
    line = cells(below_table({"tiny": comparison(105.0)}, {"tiny": [above]}))
    assert line[4:8] == [
        "1",
        "1 (0)",
        "1",
        "uniform_sqrt at 0.5 MB, 5.000% (below ours by 1.869% of our time)",
    ]


def test_points_of_ours_that_are_a_rival_s_are_counted() -> None:
    """Equal peak and time; what everybody has, recomputing nothing, is nobody's."""
    whole = comparison(110.0)
    assert cells(below_table({"tiny": whole}, {}))[8] == "1 (uniform_sqrt 1)"
    eager = replace(whole.rows[0], strategy="none")
    with_none = replace(whole, rows=(eager, *whole.rows))
    assert cells(below_table({"tiny": with_none}, {}))[8] == "1 (none)"


def test_without_ours_nothing_is_said_of_our_curve() -> None:
    """A comparison that auto took no part in has dashes, and the page is still written."""
    whole = comparison(105.0)
    without = replace(whole, rows=tuple(r for r in whole.rows if r.strategy != "auto"))
    line = cells(below_table({"tiny": without}, {}))
    assert line == ["tiny", "1", "2 (0)", "1", *["–"] * 6]


def test_files_of_an_earlier_run_go_before_a_model_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that crashes at once leaves nothing to take for its results."""
    for name in ("vgg16", "vgg16_bn"):
        comparison(130.0).save(tmp_path / f"{name}.json")
        (tmp_path / f"{name}_matched.json").write_text("[]", encoding="utf-8")
        (tmp_path / f"{name}_measured.png").write_text("", encoding="utf-8")
    monkeypatch.setattr("benchmarks.compare.__main__.sys.executable", "false")
    assert "ended with 1" in run_worker(Job(model="vgg16", out=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {
        "vgg16_bn.json",
        "vgg16_bn_matched.json",
        "vgg16_bn_measured.png",
    }


def test_the_table_has_budgets_strategies_and_the_bound() -> None:
    """Overheads in per cent of the unplanned step, ours in bold, the bound in the last line."""
    whole = comparison(130.0)
    own = [replace(r, solve_s=0.25) if r.budget_bytes is None else r for r in whole.rows]
    lines = predicted_table(replace(whole, rows=tuple(own))).splitlines()
    assert lines[0] == "| strategy | longest plan time | its own choice | 0.5 MB (50%) |"
    assert lines[2:] == [
        "| uniform_sqrt | 0.25 s | 0.5 MB, 30.0% | 30.00% |",
        "| **auto** | – |  | 10.00% |",
        "| lower bound, in eager's order |  |  | 8.00% |",
    ]


def test_how_long_was_looked_is_said() -> None:
    """The limit of a solve, and the search that rows' times do not have in them."""
    whole = comparison(130.0)
    assert "Solves had" not in facts(whole)
    words = facts(replace(whole, time_limit_s=12.0, least_solve_s=3.21))
    assert words.endswith("Solves had 12 s, the search for the least peak took 3.2 s.")


def test_a_bound_is_rounded_down() -> None:
    """A printed bound is one still: 3.4567 % is at least 3.45 %, not 3.46 %."""
    whole = comparison(130.0)
    bound = replace(whole.bounds[0], lower_bound_us=103.4567)
    least = replace(whole, bounds=(bound,), least_bound_bytes=399_990)
    assert predicted_table(least).splitlines()[-1].endswith("| 3.45% |")
    assert "none below 0.3 MB in eager's order" in facts(least)


def test_a_row_that_the_bound_does_not_speak_of_is_marked() -> None:
    """By its flag, or because it is below a bound of eager's order."""
    whole = comparison(105.0)
    rows = (replace(whole.rows[0], gap=-0.03), *whole.rows[1:])
    assert "| 5.00%† |" in predicted_table(replace(whole, rows=rows))
    rows = (replace(whole.rows[0], off_order=True), *whole.rows[1:])
    assert "| 5.00%† |" in predicted_table(replace(whole, rows=rows))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("proven: nothing fits in 5 bytes; every schedule needs 6", "×"),
        ("moccasin: no schedule found in 5 bytes within 8 s", "?"),
        ("nothing found that fits in 5 bytes; the least peak known", "?"),
        ("no attention core: attention is fused", "n/a"),
        ("DTR runs out of memory: 'mm' needs 5 bytes", "–"),
        ("KeyError: 'mm'", "failed"),
        ("InvalidScheduleError: run 3 reads what is freed", "failed"),
    ],
)
def test_each_reason_for_no_figure_has_its_sign(error: str, expected: str) -> None:
    """Not one dash for all; the legend has every sign."""
    outcome = RowOutcome(with_outcome({"error": error})["outcome"])  # as of an older file
    row = ComparisonRow(strategy="x", budget="50%", budget_bytes=5, error=error, outcome=outcome)
    assert sign(row) == expected
    assert f"{expected}: " in LEGEND


def test_what_failed_or_does_not_apply_is_said_below_the_table() -> None:
    """Once for each reason, and a failure with where it was."""
    whole = comparison(130.0)
    crashed = ComparisonRow(
        strategy="dtr",
        budget="50%",
        budget_bytes=500_000,
        error="KeyError: 'mm'",
        outcome=RowOutcome.FAILED,
    )
    refused = ComparisonRow(
        strategy="megatron_selective",
        error="no attention core: no softmax",
        outcome=RowOutcome.NOT_APPLICABLE,
    )
    words = no_figures(replace(whole, rows=(*whole.rows, crashed, refused, refused)))
    assert words.splitlines() == [
        "- `dtr` (failed, at 50%): KeyError: 'mm'",
        "- `megatron_selective` (n/a): no attention core: no softmax",
    ]


@pytest.mark.slow
def test_ours_beside_a_strategy_on_a_chain() -> None:
    """Eight layers of two unit operators: its peak and cost by hand, ours no worse in both."""
    graph = layered(8)
    found = match_peak_and_time(
        graph,
        "transformers_per_layer",
        least=least_memory(graph, time_limit_s=2.0),
        solved=partial(solve, graph, time_limit_s=2.0),
    )
    assert found.peak_bytes == 8 + 2
    assert found.overhead == pytest.approx(8 / graph.base_cost_ns)
    assert found.our_overhead is not None
    assert found.bound_overhead is not None
    assert found.bound_overhead <= found.our_overhead <= found.overhead
    assert found.our_peak_bytes is not None
    assert found.bound_peak_bytes is not None
    assert found.bound_peak_bytes < found.our_peak_bytes <= found.peak_bytes
    for ratio, limit, verdict in (
        (found.overhead_ratio, 0.5, found.half_overhead),
        (found.peak_ratio, 0.7, found.low_peak),
    ):
        assert ratio is not None
        assert (ratio <= limit) == (verdict is Wanted.MET)


def test_a_rival_without_overhead_has_its_own_words() -> None:
    """There is no half of nothing; that is not the same as nothing found."""
    costly = layered(4)
    free = [replace(op, cost_ns=int(op.phase == "backward")) for op in costly.operators]
    graph = CostGraph(tuple(free), costly.storages)
    found = match_peak_and_time(
        graph,
        "transformers_per_layer",
        least=least_memory(graph, time_limit_s=0.5),
        solved=partial(solve, graph, time_limit_s=0.2),
    )
    assert found.our_overhead is not None
    assert found.overhead_ratio is None
    assert found.half_overhead is Wanted.NO_OVERHEAD


@pytest.mark.slow
def test_says_where_half_is_impossible() -> None:
    """Uniform sqrt(L) on a unit chain is so near the optimum that the bound excludes half."""
    graph = unit_chain(9)
    found = match_peak_and_time(
        graph,
        "uniform_sqrt",
        least=least_memory(graph, time_limit_s=2.0),
        solved=partial(solve, graph, time_limit_s=5.0),
    )
    assert found.peak_bytes < keep_all_peak_bytes(graph)
    assert found.half_overhead is Wanted.IMPOSSIBLE
    assert found.half_overhead_words.startswith("proven impossible in eager's order: nothing")


def test_a_strategy_that_does_not_apply_is_a_line() -> None:
    """With its reason, and the other lines stay."""
    table = matched_table({"tiny": [MatchedRow(strategy="uniform_sqrt", error="no blocks")]})
    assert "| tiny | uniform_sqrt | no blocks |" in table
    words = report(Found(comparisons={"tiny": comparison(130.0)}, failures={"bert": "killed"}))
    assert "| bert | killed |" in words


@pytest.mark.slow
def test_a_model_that_fails_is_said(tmp_path: Path) -> None:
    """The process that ends in an error leaves nothing but a word about it."""
    error = run_worker(Job(model="no such model", out=str(tmp_path)))
    assert "ended with 1" in error
    assert read(tmp_path, ("no such model",), {}).comparisons == {}


@pytest.mark.slow
def test_the_whole_way_on_a_tiny_model(tmp_path: Path) -> None:
    """JSON, CSV, figures and a page of tables come out of one command."""
    result = CliRunner().invoke(
        app,
        "vgg16 --size tiny --predicted --limit-s 0.5 --num-budgets 2 --no-matched --strategy auto "
        f"--strategy none --strategy uniform_sqrt --out {tmp_path}",
    )
    assert result.exit_code == 0, result.output
    for name in (
        "vgg16.json",
        "vgg16.csv",
        "vgg16_settled.json",
        "vgg16_predicted.png",
        "compare.md",
        "compare.json",
    ):
        assert (tmp_path / name).stat().st_size > 0
    assert "| **auto** |" in (tmp_path / "compare.md").read_text(encoding="utf-8")
