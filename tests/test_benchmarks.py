"""The benchmarks run, and derive the right figures from what they hear."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.growth import Growth
from benchmarks.instances import Instance, chain, find_instances, layered
from benchmarks.run import Run, as_record, best_costs, heard, run
from benchmarks.solvers import app
from solvers.instances import keep_all_peak_bytes

ROW = Run(
    instance="test",
    num_operators=10,
    base_cost_ns=1000,
    budget=0.5,
    budget_bytes=100,
    solver="test",
    status="broken",
)


def said(*moments: tuple[float, int | None, int], status: str = "feasible") -> str:
    """What a worker writes: events, and the last one again as its result."""
    lines = [{"elapsed_s": t, "cost_ns": cost, "bound_ns": bound} for t, cost, bound in moments]
    _, cost, bound = moments[-1]
    result = {
        "status": status,
        "cost_ns": cost,
        "bound_ns": bound,
        "bound_scope": "any_order",
        "global_bound_ns": bound,
        "peak_bytes": 90,
        "solve_s": moments[-1][0] + 1,
        "num_runs": 12,
    }
    return "\n".join(json.dumps(line) for line in [*lines, {"result": result}])


def test_says_when_what_was_reached() -> None:
    """First schedule at 2 s, within 1 % of 1,100 at 3 s, proven at 5 s."""
    row = heard(
        ROW,
        said((1, None, 1010), (2, 1200, 1010), (3, 1111, 1050), (4, 1100, 1080), (5, 1100, 1100)),
    )
    assert (row.first_s, row.within_s(1100), row.proof_s) == (2, 3, 5)
    assert row.gap_s(0.02) == 4
    record = as_record(row, 1100)
    assert record["overhead_percent"] == pytest.approx(10)
    assert record["bound_percent"] == pytest.approx(10)
    assert record["gap_percent"] == 0


def test_infeasibility_is_a_proof() -> None:
    """Where nothing fits, the proof is the end, and there is no schedule to be near to."""
    row = heard(ROW, said((1, None, 1010), status="infeasible"))
    assert (row.first_s, row.within_s(None), row.proof_s) == (None, None, 2)
    assert row.gap == math.inf
    assert best_costs([row]) == {}


def test_a_worker_that_dies_leaves_what_it_said() -> None:
    """Without a result a run is broken; a line that was cut off is ignored."""
    row = heard(ROW, '{"elapsed_s": 1, "cost_ns": 1200, "bound_ns": 1000}\n{"elapsed_s": 2, "c')
    assert row.status == "broken"
    assert (row.first_s, row.cost_ns) == (1, 1200)


def test_fits_the_power_of_the_growth() -> None:
    """Times that quadruple with twice the layers grow by the square."""
    runs = tuple((n, heard(ROW, said((n * n / 100, 1100, 1100)))) for n in (6, 12, 24))
    growth = Growth(family="test", budget=0.5, solver="test", runs=runs)
    fit = growth.fit("to a proof")
    assert fit is not None
    assert fit.exponent == pytest.approx(2)
    assert fit.at(48) == pytest.approx(48 * 48 / 100)


def test_instances_are_the_same_each_time() -> None:
    """A seed names a graph; another seed names another one."""
    assert layered(40, 1) == layered(40, 1)
    assert layered(40, 1) != layered(40, 2)
    assert layered(40, 1).num_operators == 40
    assert chain(5, 3).num_operators == 11


def test_what_is_layered_is_read() -> None:
    """Everything but the last layer has a reader, at some 2 to 3 edges an operator."""
    graph = layered(100, 0)
    unread = [k for k, readers in enumerate(graph.consumers) if not readers]
    assert unread == list(range(unread[0], 100))
    assert 180 <= sum(len(op.inputs) for op in graph.operators) <= 320


def test_instances_come_from_names_files_and_folders(tmp_path: Path) -> None:
    """A cost graph's JSON and a plain DAG are told apart; a wrong name says what there is."""
    (tmp_path / "graph.json").write_text(chain(3, 0).to_json())
    plain = {"nodes": [{"name": "a", "cost": 1, "size": 2}], "edges": []}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    found = find_instances([str(tmp_path), str(tmp_path / "plain.json"), "chain:4"], seed=1)
    assert [case.name for case in found] == ["graph", "plain", "plain", "chain:4"]
    assert [case.graph.num_operators for case in found] == [7, 1, 1, 9]
    with pytest.raises(ValueError, match="'ring:4' is neither a path nor one of chain:SIZE"):
        find_instances(["ring:4"])


def test_a_broken_solver_is_a_row() -> None:
    """What a solver raises is reported, and nothing is raised here."""
    row = run(Instance(name="chain:3", graph=chain(3, 0)), 0.9, "magic", limit_s=1)
    assert row.status == "broken"
    assert "unknown solver 'magic'" in row.error


@pytest.mark.slow
def test_compares_solvers(tmp_path: Path) -> None:
    """On a tiny chain a table, figures and plots come out; slice refinement has its proof."""
    arguments = ["compare", "chain:8", "--budget", "0.7", "--limit-s", "5", "--out", str(tmp_path)]
    solvers = ["--solver", "keep_all", "--solver", "slice_refinement"]
    outcome = CliRunner().invoke(app, [*arguments, *solvers], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "slice_refinement" in outcome.output
    with (tmp_path / "runs.csv").open(encoding="utf-8") as file:
        rows = {row["solver"]: row for row in csv.DictReader(file)}
    proven = rows["slice_refinement"]
    assert proven["status"] == "optimal"
    assert 0 <= float(proven["first_s"]) <= float(proven["proof_s"]) <= 5
    assert int(proven["peak_bytes"]) <= 0.7 * keep_all_peak_bytes(chain(8, 0))
    assert rows["keep_all"]["first_s"] == ""
    data = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))
    assert data["settings"] == {"limit_s": 5, "seed": 0, "workers": 2}
    assert data["circumstances"]["versions"]["highspy"]
    assert data["runs"][1]["moments"][-1]["cost_ns"] == int(proven["cost_ns"])
    assert (tmp_path / "profiles.png").stat().st_size > 1000
    assert (tmp_path / "gaps.png").stat().st_size > 1000


@pytest.mark.slow
def test_measures_growth(tmp_path: Path) -> None:
    """Two sizes of a chain give a table, a plot and, where both were proven, a fit."""
    arguments = ["growth", "--family", "chain", "--layers", "8", "--layers", "9", "--budget", "0.7"]
    outcome = CliRunner().invoke(
        app, [*arguments, "--limit-s", "5", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert outcome.exit_code == 0, outcome.output
    assert "to a proof" in outcome.output
    assert (tmp_path / "growth.png").stat().st_size > 1000
