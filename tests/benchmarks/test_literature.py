"""Experiments of the literature: chains counted by hand, time and memory, largest batches."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.literature.__main__ import app
from benchmarks.literature.batches import (
    LargestBatch,
    Rule,
    StepLine,
    largest_batch,
)
from benchmarks.literature.chain_steps import (
    LAYER_BYTES,
    LAYER_NS,
    mlp_chain,
    plain_chain,
)
from benchmarks.literature.chains import (
    chain_rows,
    chain_tables,
    growth_rows,
)
from benchmarks.literature.checkmate import (
    batch_table,
    by_solving,
    by_strategy,
    sweep_tables,
)
from benchmarks.literature.half import half_table
from benchmarks.literature.questions import (
    Figure,
    answer,
    forward_ns,
    least_peak_within,
    optimum_figure,
    strategy_figure,
)
from graph_capture.cost_graph import CostGraph
from solvers.incumbent import Incumbent
from solvers.instances import keep_all_peak_bytes
from solvers.result import SolveResult

BUDGET = 40 * LAYER_BYTES


def chain_of_batch(batch: int) -> CostGraph:
    """Four layers whose sizes and times are those of a batch."""
    graph = plain_chain(4)
    return CostGraph(
        tuple(replace(op, cost_ns=op.cost_ns * batch) for op in graph.operators),
        tuple(replace(s, size_bytes=s.size_bytes * batch) for s in graph.storages),
    )


def test_a_plain_chain_is_counted_by_hand() -> None:
    """Four layers: 12 c; the loss and the backward pass of layer 4 each hold five results."""
    graph = plain_chain(4)
    assert graph.base_cost_ns == 12 * LAYER_NS
    assert forward_ns(graph) == 4 * LAYER_NS
    assert keep_all_peak_bytes(graph) == 5 * LAYER_BYTES


@pytest.mark.parametrize("num_layers", [4, 16, 64])
def test_square_root_by_hand(num_layers: int) -> None:
    """sqrt(L) - 1 segments each run again all layers but their last; 2 sqrt(L) results live."""
    root = math.isqrt(num_layers)
    figure = strategy_figure(plain_chain(num_layers), "uniform_sqrt")
    assert figure.peak_bytes == 2 * root * LAYER_BYTES
    assert figure.overhead == pytest.approx((root - 1) ** 2 / (3 * num_layers))


def test_growth_is_the_square_root() -> None:
    """Exponent one half for uniform segments, less for recursion, one for keeping everything."""
    rows = [
        row for n in (16, 64) for row in chain_rows("plain", n, plain_chain(n), time_limit_s=0.2)
    ]
    growth = {fit["strategy"]: fit["exponent"] for fit in growth_rows(rows)}
    assert growth["uniform_sqrt"] == pytest.approx(0.5)
    assert growth["chen_recursive"] < 0.35
    assert growth["none"] > 0.9
    for row in rows:
        assert row["optimum_overhead"] <= row["overhead"] + 1e-9
    assert "| `uniform_sqrt` | 0.471; 18.8% (18.8%) |" in chain_tables(rows)


def test_captured_chains_are_mostly_activations() -> None:
    """What grows with the layers is not parameters, and each layer is a block."""
    graph = mlp_chain(4)
    assert graph.resident_bytes < 0.1 * keep_all_peak_bytes(graph)
    assert strategy_figure(graph, "uniform_sqrt").setting == "segments=2"


def test_answers_are_found_or_excluded() -> None:
    """Four results' memory takes one layer more; at no more time a bound excludes it."""
    graph = plain_chain(4)
    budget = 4 * LAYER_BYTES
    found = answer(graph, budget, 13 * LAYER_NS, time_limit_s=5)
    assert found.schedule is not None
    none = answer(graph, budget, 12 * LAYER_NS, time_limit_s=5)
    assert none.schedule is None
    assert none.excluded
    assert answer(graph, 2 * LAYER_BYTES, 99 * LAYER_NS, time_limit_s=5).excluded
    optimum = optimum_figure(graph, budget, time_limit_s=5)
    assert optimum.overhead == pytest.approx(1 / 12)
    assert optimum.gap == pytest.approx(0.0, abs=1e-3)


def test_bounds_of_staged_schedules_exclude_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solve neither ends at such a bound nor is its optimum proven by it."""
    graph = plain_chain(4)
    limit_ns = 12 * LAYER_NS

    def staged(*arguments: Any, stop: Event | None = None, **options: Any) -> SolveResult:
        state = Incumbent(graph, 4 * LAYER_BYTES, 1.0, options.get("progress"), stop)
        state.raise_bound(limit_ns + 1, "test", staged=True)
        assert not state.stopped
        state.offer(two_halves, "test")
        return state.result()

    found = optimum_figure(graph, 4 * LAYER_BYTES, time_limit_s=5)
    assert found.schedule is not None
    two_halves = found.schedule
    monkeypatch.setattr("benchmarks.literature.questions.solve", staged)
    assert not answer(graph, 4 * LAYER_BYTES, limit_ns, time_limit_s=1).excluded
    assert optimum_figure(graph, 4 * LAYER_BYTES, time_limit_s=1).bound == 0.0


@pytest.mark.parametrize(("more_layers", "results"), [(0, 5), (1, 4), (3, 3)])
def test_least_peak_within_a_time(more_layers: int, results: int) -> None:
    """Of four layers: five results live, four for one layer more, three for three more."""
    least = least_peak_within(plain_chain(4), (12 + more_layers) * LAYER_NS, time_limit_s=2)
    assert least.peak_bytes == results * LAYER_BYTES
    assert least.excluded_bytes < least.peak_bytes


def test_least_peak_begins_with_what_is_known() -> None:
    """Without time to search, a known schedule that is quick enough is the answer."""
    graph = plain_chain(16)
    uniform = strategy_figure(graph, "uniform_sqrt")
    assert uniform.schedule is not None
    assert uniform.overhead is not None
    for share, results in ((uniform.overhead, 8), (uniform.overhead / 2, 17)):
        limit_ns = round((1 + share) * graph.base_cost_ns)
        least = least_peak_within(
            graph, limit_ns, time_limit_s=0, tolerance=1.0, known=[uniform.schedule]
        )
        assert least.peak_bytes == results * LAYER_BYTES


def test_largest_batches_by_hand() -> None:
    """40 results: batch 8 with five a row; 13 with three, for one forward pass at most."""
    line = StepLine(chain_of_batch, 2, 4)
    rule = Rule(budget_bytes=BUDGET)
    assert largest_batch(line, rule, by_strategy("none")).batch == 8
    uniform = largest_batch(line, rule, by_strategy("uniform_sqrt"), start=30)
    assert (uniform.batch, uniform.peak_bytes) == (10, BUDGET)
    ours = largest_batch(line, rule, by_solving(3), start=8, prove=True)
    assert (ours.batch, ours.excluded, ours.overhead) == (13, 14, pytest.approx(0.25))
    thrifty = Rule(budget_bytes=BUDGET, extra_forwards=0.25)
    assert largest_batch(line, thrifty, by_solving(3)).batch == 10
    assert largest_batch(line, Rule(budget_bytes=1), by_strategy("none")) == LargestBatch(batch=0)


def test_lines_need_the_same_wiring() -> None:
    """Two steps of different calls say nothing about a third."""
    with pytest.raises(ValueError, match="not of the same wiring"):
        StepLine(plain_chain, 4, 8)


def test_a_refused_strategy_says_why() -> None:
    """Per-layer checkpointing has nothing to hold on to in a graph without modules."""
    graph = plain_chain(4)
    bare = CostGraph(tuple(replace(op, module_path="") for op in graph.operators), graph.storages)
    figure = strategy_figure(bare, "transformers_per_layer")
    assert figure == Figure(strategy="transformers_per_layer", error=figure.error)
    assert "block" in figure.error


def test_tables_show_what_is_missing() -> None:
    """A strategy that does not fit is a dash; without a proof the cell stays empty."""
    swept = {
        "model": "m",
        "description": "d",
        "budget_bytes": 10**9,
        "keep_all_bytes": 2 * 10**9,
        "overhead": 0.5,
        "fits": False,
        "gap": None,
        "error": "",
    }
    ours = {**swept, "strategy": "auto", "fits": True, "overhead": 0.1, "gap": 0.01}
    late = {**swept, "strategy": "checkmate_lp_rounding", "error": "no schedule found"}
    none = {**swept, "strategy": "rotor", "error": "rotor: proven: nothing fits in 2 bytes"}
    refused = {**swept, "strategy": "ap_greedy", "error": "no articulation points: data flows"}
    words = sweep_tables([{**swept, "strategy": "ap_sqrt"}, late, none, refused, ours])
    assert "| `checkmate_lp_rounding` | ? |" in words
    assert "| `rotor` | × |" in words
    assert "| `ap_greedy` | n/a |" in words
    assert "| `ap_sqrt` | – |" in words
    assert "| `auto` | 10.0% |" in words
    batches = {"none": 10, "ap_sqrt": 12, "auto": 30}
    rows = [
        {"model": "m", "strategy": s, "batch": b, "excluded": None, "overhead": 0.25}
        for s, b in batches.items()
    ]
    assert "| m | 10 | 12 | 30 |  | 3.00 | 2.50 | 25.0%, 25.0% |" in batch_table(rows)
    assert "| at most, by interpolation |" in batch_table(rows)
    half = {
        "model": "m",
        "peak_bytes": 10**9,
        "usual": {
            "transformers_per_layer": {"share": None, "overhead": None},
            "uniform_sqrt": {"share": 0.6, "overhead": 0.2},
        },
        "share": 0.5,
        "optimum_overhead": None,
        "optimum_error": "proven: nothing fits",
        "overhead": 0.2,
        "least_share": 0.6,
        "excluded_share": 0.59,
    }
    line = "| m | 1.00 | refused | 0.600, 20.0% | proven: nothing fits |  | 0.600 | 0.590 |"
    assert line in half_table([half])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "stem"),
    [
        ("chains --family plain --layers 4", "chains"),
        ("checkmate --part sweep --sweep vgg16 --size tiny", "checkmate-sweep"),
        (
            "checkmate --part enlarge --enlarge vgg16 --size tiny --budget-gb 0.02",
            "checkmate-batch",
        ),
        ("half --model unet --size tiny --device cpu", "half-tiny-cpu"),
    ],
    ids=["chains", "sweep", "enlarge", "half"],
)
def test_commands_leave_tables(command: str, stem: str, tmp_path: Path) -> None:
    """JSON with the machine and the command, and the table in Markdown."""
    outcome = CliRunner().invoke(
        app, [*command.split(), "--limit-s", "1", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert outcome.exit_code == 0, outcome.output
    data = json.loads((tmp_path / f"{stem}.json").read_text(encoding="utf-8"))
    assert data["rows"]
    assert "python -m benchmarks.literature" in data["circumstances"]["command"]
    assert (tmp_path / f"{stem}.md").read_text(encoding="utf-8").count("|") > 10


def test_commands_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    """A wrong name is an error of usage."""
    for wrong in (
        ["half", "--model", "vgg11"],
        ["checkmate", "--part", "c"],
        ["half", "--size", "xl"],
    ):
        assert CliRunner().invoke(app, [*wrong, "--out", str(tmp_path)]).exit_code == 2
