"""The comparison of record on a tiny model, and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.compare.__main__ import app, read, run_worker
from benchmarks.compare.matched import NO_OVERHEAD, Matched, matched
from benchmarks.compare.tables import below_table, matched_table, predicted_table, report
from benchmarks.compare.worker import Job
from planner.comparing.comparison import BudgetBound, Comparison, ComparisonRow
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory
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
        bounds=(BudgetBound(budget="50%", budget_bytes=500_000, lower_bound_us=108.0, scope="x"),),
        baseline_peak_bytes=1_000_000,
        baseline_step_us=100.0,
        least_bytes=400_000,
        least_bound_bytes=400_000,
        device="cpu",
        cost_model="roofline",
        fingerprint="0",
        seed=0,
    )


def test_a_point_below_ours_is_counted() -> None:
    """One that takes less time than ours at our budget, and none where it takes more."""
    assert "| tiny | 2 | 2 | uniform_sqrt at 50%, uniform_sqrt at its own choice | 2.00%" in (
        below_table({"tiny": comparison(105.0)})
    )
    assert "| tiny | 2 | 0 | – | 2.00% |" in below_table({"tiny": comparison(130.0)})


def test_without_ours_nothing_is_said_of_our_curve() -> None:
    """A comparison that auto took no part in has dashes, and the page is still written."""
    whole = comparison(105.0)
    without = replace(whole, rows=tuple(r for r in whole.rows if r.strategy != "auto"))
    assert "| tiny | 2 | – | – | – |" in below_table({"tiny": without})


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
    lines = predicted_table(comparison(130.0)).splitlines()
    assert lines[0] == "| strategy | its own choice | 0.5 MB (50%) |"
    assert lines[2:] == [
        "| uniform_sqrt | 0.5 MB, 30.0% | 30.00% |",
        "| **auto** |  | 10.00% |",
        "| lower bound |  | 8.00% |",
    ]


def test_ours_beside_a_strategy_on_a_chain() -> None:
    """Eight layers of two unit operators: its peak and cost by hand, ours no worse in both."""
    graph = layered(8)
    found = matched(
        graph,
        "transformers_per_layer",
        baseline_ns=graph.base_cost_ns,
        least=least_memory(graph, time_limit_s=2.0),
        time_limit_s=2.0,
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
        (found.overhead_ratio, 0.5, found.overhead_verdict),
        (found.peak_ratio, 0.7, found.peak_verdict),
    ):
        assert ratio is not None
        assert (ratio <= limit) == (verdict == "met")


def test_a_rival_without_overhead_has_its_own_words() -> None:
    """There is no half of nothing; that is not the same as nothing found."""
    graph = layered(4)
    found = matched(
        graph,
        "transformers_per_layer",
        baseline_ns=2 * graph.base_cost_ns,
        least=least_memory(graph, time_limit_s=1.0),
        time_limit_s=1.0,
    )
    assert found.our_overhead is not None
    assert found.overhead_ratio is None
    assert found.overhead_verdict == NO_OVERHEAD


@pytest.mark.slow
def test_says_where_half_is_impossible() -> None:
    """Uniform sqrt(L) on a unit chain is so near the optimum that the bound excludes half."""
    graph = unit_chain(9)
    found = matched(
        graph,
        "uniform_sqrt",
        baseline_ns=graph.base_cost_ns,
        least=least_memory(graph, time_limit_s=2.0),
        time_limit_s=5.0,
    )
    assert found.peak_bytes < keep_all_peak_bytes(graph)
    assert found.overhead_verdict.startswith("proven impossible")


def test_a_strategy_that_does_not_apply_is_a_line() -> None:
    """With its reason, and the other lines stay."""
    table = matched_table({"tiny": [Matched(strategy="uniform_sqrt", error="no blocks")]})
    assert "| tiny | uniform_sqrt | no blocks |" in table
    words = report({"tiny": comparison(130.0)}, {}, {"bert": "killed"})
    assert "| bert | killed |" in words


@pytest.mark.slow
def test_a_model_that_fails_is_said(tmp_path: Path) -> None:
    """The process that ends in an error leaves nothing but a word about it."""
    error = run_worker(Job(model="no such model", out=str(tmp_path)))
    assert "ended with 1" in error
    assert read(tmp_path, ("no such model",)) == ({}, {})


@pytest.mark.slow
def test_the_whole_way_on_a_tiny_model(tmp_path: Path) -> None:
    """JSON, CSV, figures and a page of tables come out of one command."""
    result = CliRunner().invoke(
        app,
        "vgg16 --size tiny --predicted --limit-s 0.5 --num-budgets 2 --no-matched --strategy auto "
        f"--strategy none --strategy uniform_sqrt --out {tmp_path}",
    )
    assert result.exit_code == 0, result.output
    for name in ("vgg16.json", "vgg16.csv", "vgg16_predicted.png", "compare.md", "compare.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert "| **auto** |" in (tmp_path / "compare.md").read_text(encoding="utf-8")
