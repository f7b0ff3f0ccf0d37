"""`planner.compare`: rows, bounds and real steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.testing.zoo import ZOO
from graph_capture.cost_graph import CostGraph
from graph_capture.step_capture import capture
from planner import Comparison, compare, optimize
from planner.comparing.bound_text import OTHER_ORDER
from planner.comparing.machine import cpu_name
from planner.comparing.peers import PEERS, Peer
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.result import SolveResult, SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope
from solvers.strategies import STRATEGIES, apply_strategy
from tests.planner.small import Net, make, sample, square

CHEAP = ("none", "uniform_sqrt", "dtr", "auto")


def broken(graph: CostGraph, budget_bytes: int | None) -> Schedule:
    """A user's strategy that fails."""
    raise KeyError("no such layer")


def invalid(graph: CostGraph, budget_bytes: int | None) -> Schedule:
    """A user's strategy that proposes what computes nothing."""
    return Schedule((0,))


def predicted(**options: Any) -> Comparison:
    """A comparison without real steps."""
    defaults = {"budgets": [0.6], "strategies": CHEAP, "measure": False, "time_limit_s": 2}
    return compare(make(), sample(), loss_fn=square, **(defaults | options))


@pytest.fixture(scope="module")
def measured() -> Comparison:
    """A comparison on a small model, with real steps and a peer."""
    return compare(
        make(),
        sample(),
        loss_fn=square,
        budgets=["70%", "uniform_sqrt", "1kB"],
        strategies=[*CHEAP, broken, invalid],
        peers=["checkpoint_per_block"],
        time_limit_s=2,
        repeats=1,
        name="small",
    )


def test_figures_are_those_of_the_judge(measured: Comparison) -> None:
    """Predicted figures equal apply_strategy's on the captured graph."""
    graph = capture(make(), sample(), loss_fn=square)
    for row in measured.rows:
        if row.strategy not in ("none", "uniform_sqrt", "dtr") or row.error:
            continue
        outcome = apply_strategy(STRATEGIES[row.strategy], graph, budget_bytes=row.budget_bytes)
        assert row.predicted_peak_bytes == outcome.peak_bytes
        assert row.predicted_step_us == outcome.cost_ns / 1e3
        assert row.setting == outcome.setting
        assert row.fits == (None if row.budget_bytes is None else outcome.fits)
        assert row.num_recomputed == len(outcome.schedule.order) - graph.num_operators


def test_rows_are_in_order(measured: Comparison) -> None:
    """Budget after budget, strategies in the registry's order, own choices, peers."""
    names = ["none", "uniform_sqrt", "dtr", "auto", "broken", "invalid"]
    own = [name for name in names if name not in ("dtr", "auto")]
    expected = [(name, b) for b in ("70%", "uniform_sqrt", "1kB") for name in names]
    expected += [(name, "") for name in own] + [("checkpoint_per_block", "")]
    assert [(row.strategy, row.budget) for row in measured.rows] == expected


def test_measured_peaks_are_the_predicted_ones(measured: Comparison) -> None:
    """Every schedule that fits a budget ran, with the predicted peak and eager's bits."""
    ran = [row for row in measured.rows if row.measured and row.kind == "strategy"]
    for row in ran:
        assert row.measured is not None
        assert row.measured.peak_bytes == row.predicted_peak_bytes, row.strategy
        assert (row.measured.bits, row.measured.difference) == ("equal", "")
        assert row.measured.num_pairs == 2  # each goes first equally often
        assert row.measured.ratio > 0
    for row in measured.rows:
        if row.fits or (not row.budget and not row.error):
            assert row.measured is not None, row
    assert measured.eager is not None
    assert measured.eager.bits == "equal"
    assert abs(measured.eager.peak_bytes - measured.baseline_peak_bytes) <= 64  # scalars


def test_a_schedule_runs_once(measured: Comparison) -> None:
    """Rows with the same schedule have the figures of the same steps."""
    rows = [measured.row("uniform_sqrt", b) for b in ("", "70%", "uniform_sqrt")]
    assert rows[0].measured is rows[1].measured is rows[2].measured


def test_what_fails_is_told_in_its_row(measured: Comparison) -> None:
    """A function that raises, or proposes nonsense, has its error in each of its rows."""
    for budget in ("", "70%", "uniform_sqrt", "1kB"):
        assert "KeyError: 'no such layer'" in measured.row("broken", budget).error
        assert measured.row("invalid", budget).error
        assert measured.row("broken", budget).predicted_peak_bytes is None
    assert measured.row("none").error == ""


def test_a_budget_below_everything_is_proven(measured: Comparison) -> None:
    """No row fits a budget below the least memory, and the bound says that none can."""
    rows = [row for row in measured.rows if row.budget == "1kB"]
    assert not any(row.fits for row in rows)
    assert measured.bound("1kB").lower_bound_us is None
    assert (
        "proven: nothing fits in 1000 bytes in eager's order" in measured.row("auto", "1kB").error
    )
    assert (
        measured.row("none", "1kB").predicted_peak_bytes
        == measured.row("none").predicted_peak_bytes
    )


def test_what_steps_ran_on_is_kept(measured: Comparison) -> None:
    """The machine that measured is told from the one that times are predicted for."""
    assert measured.measured_on == cpu_name()
    assert (measured.num_threads, measured.repeats) == (torch.get_num_threads(), 1)
    assert (measured.dtype, measured.autocast, measured.optimizer) == ("float32", "", "")
    only = predicted(strategies=["none"], optimizer="adamw", autocast=torch.bfloat16, budgets=[])
    assert (only.autocast, only.optimizer) == ("bfloat16", "adamw")
    assert (only.measured_on, only.num_threads, only.repeats) == ("", None, 0)


def test_another_order_is_noted() -> None:
    """The bound speaks of eager's order; a schedule that leaves it has that in its row."""

    def swapped(graph: CostGraph, budget_bytes: int | None) -> Schedule | None:
        order = list(range(graph.num_operators))
        for i in range(graph.num_operators - 1):
            other = [*order[:i], i + 1, i, *order[i + 2 :]]
            try:
                replay(graph, Schedule(tuple(other)))
            except ValueError:
                continue
            return Schedule(tuple(other))
        raise AssertionError("no two operators can be swapped")

    found = predicted(strategies=["none", swapped], budgets=[1.0])
    assert found.row("swapped", "100%").off_order
    assert not found.row("none", "100%").off_order
    assert f"swapped: {OTHER_ORDER}" in str(found)


def test_the_least_memory_search_has_its_own_time() -> None:
    """It is in no row's time; a search that this process remembers takes none."""
    first, again = (predicted(strategies=["auto"], seed=7) for _ in range(2))
    assert first.least_solve_s is not None
    assert again.least_solve_s is None


def test_a_wrapped_solver_notes_the_gap_to_its_own_bound() -> None:
    """The column is the gap to the comparison's bound, which may be another figure."""
    row = predicted(strategies=["uniform_bytes"], budgets=["95%"]).row("uniform_bytes", "95%")
    assert "gap to its own bound" in row.note


def test_bounds_hold(measured: Comparison) -> None:
    """No row is below the bound of its budget, and gaps are to it."""
    for row in measured.rows:
        if row.fits:
            bound_us = measured.bound(row.budget).lower_bound_us
            assert bound_us is not None
            assert row.predicted_step_us is not None
            assert row.predicted_step_us >= bound_us
            assert row.gap == pytest.approx(row.predicted_step_us / bound_us - 1)
    assert measured.below_ours() == ()


def test_a_strategys_peak_is_a_budget(measured: Comparison) -> None:
    """The name of a strategy stands for the peak of its own choice."""
    own = measured.row("uniform_sqrt").predicted_peak_bytes
    assert measured.row("auto", "uniform_sqrt").budget_bytes == own


def test_peers_have_rows(measured: Comparison) -> None:
    """A peer's row has measured figures only."""
    row = measured.row("checkpoint_per_block")
    assert (row.kind, row.error, row.predicted_peak_bytes) == ("peer", "", None)
    assert row.measured is not None
    assert row.measured.bits != "not compared"


def test_a_broken_peer_is_told_in_its_row() -> None:
    """A peer that raises anything does not end the comparison."""

    class Odd(Exception):
        pass

    def prepare(*arguments: object) -> Any:
        raise Odd("cannot")

    peer = Peer(name="odd", summary="", source="", prepare=prepare)
    found = compare(
        make(), sample(), loss_fn=square, budgets=[], strategies=["none"], peers=[peer], repeats=0
    )
    assert "Odd" in found.row("odd").error
    assert found.row("none").measured is not None


def test_below_ours_finds_what_is_below() -> None:
    """A strategy that is faster than ours at a peak within our budget is listed."""
    found = predicted()
    assert found.below_ours() == ()
    ours = found.row("auto", "60%")
    assert ours.budget_bytes is not None
    assert ours.predicted_step_us is not None
    better = replace(
        found.row("none"),
        predicted_peak_bytes=ours.budget_bytes,
        predicted_step_us=0.99 * ours.predicted_step_us,
    )
    worse = replace(better, predicted_peak_bytes=ours.budget_bytes + 1)
    changed = replace(found, rows=(*found.rows, better, worse))
    assert changed.below_ours() == (better,)
    assert changed.below_ours(tolerance=0.02) == ()
    assert replace(changed, gap=0.02).below_ours() == ()  # ours was not asked for more
    slightly = replace(better, predicted_step_us=0.9995 * ours.predicted_step_us)
    assert replace(found, rows=(*found.rows, slightly)).below_ours() == ()
    without = replace(found, rows=tuple(r for r in found.rows if r.strategy != "auto"))
    with pytest.raises(ValueError, match="took no part"):
        without.below_ours()


@pytest.mark.slow
def test_default_budgets_span_what_is_possible() -> None:
    """Without budgets there are eight, from the least peak to the unplanned one."""
    found = predicted(budgets=None, strategies=["none", "uniform_sqrt"])
    amounts = [bound.budget_bytes for bound in found.bounds]
    assert len(amounts) == 8
    assert amounts == sorted(amounts)
    assert amounts[-1] == found.baseline_peak_bytes
    assert found.least_bound_bytes <= found.least_bytes <= amounts[0]
    lower = [bound.lower_bound_us for bound in found.bounds if bound.lower_bound_us is not None]
    assert lower == sorted(lower, reverse=True)
    assert found.row("none", "100%").gap == pytest.approx(0)


def test_ours_is_what_optimize_finds() -> None:
    """The row of auto is the plan that optimize makes within the budget, or as fast."""
    row = predicted(strategies=["auto"]).row("auto", "60%")
    assert row.budget_bytes is not None
    plan = optimize(make(), sample(), loss_fn=square, budget_bytes=row.budget_bytes)
    assert row.predicted_step_us == pytest.approx(plan.predicted_step_us, rel=2e-3)


def test_an_optimum_among_staged_schedules_is_called_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The note names what is optimal where that is not every schedule, as the gap's bound is."""
    assert "staged" not in predicted(strategies=["auto"]).row("auto", "60%").note

    def staged(*arguments: Any, **options: Any) -> SolveResult:
        result = solve(*arguments, **options)
        assert result.cost_ns is not None
        return replace(
            result,
            status=SolveStatus.OPTIMAL,
            lower_bound_ns=result.cost_ns,
            bound_scope=BoundScope.STAGED,
        )

    monkeypatch.setattr("planner.comparing.predict.solve", staged)
    note = predicted(strategies=["auto"]).row("auto", "60%").note
    assert note.startswith("optimal among staged schedules (by ")


def test_the_gap_of_the_solves_is_kept() -> None:
    """What the solves were allowed is what below_ours allows."""
    assert predicted(strategies=["none"], budgets=[], gap=0.03).gap == 0.03


@pytest.mark.slow
def test_the_model_is_left_as_it_was() -> None:
    """Parameters, gradients, buffers, an applied plan and the generator are as before."""
    model = make()
    x = sample()
    square(model(x)).backward()
    plan = optimize(model, x, loss_fn=square, budget_gb=1)
    plan.apply(model)
    forward = model.__dict__["forward"]
    values = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    generator = torch.get_rng_state()
    found = compare(
        model,
        x,
        loss_fn=square,
        optimizer="adamw",
        budgets=[0.7],
        strategies=["uniform_sqrt", "auto"],
        peers=["checkpoint_per_block"],
        repeats=1,
        time_limit_s=1,
    )
    assert found.row("auto", "70%").measured is not None
    assert model.__dict__["forward"] is forward
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(values[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())


def test_another_device_is_predicted_only() -> None:
    """A device that is not at hand is compared by replay, and real steps there are refused."""
    options: dict[str, Any] = {"device": "h100", "strategies": ["none"], "measure": None}
    found = predicted(**options)
    assert "H100" in found.device
    assert found.eager is None
    assert found.row("none").measured is None
    with pytest.raises(ValueError, match="measure=True, but"):
        predicted(**{**options, "measure": True})
    with pytest.raises(ValueError, match="peers have measured figures only"):
        predicted(**options, peers=["checkpoint_per_block"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgets": [0.5, "hardly"]}, "not a budget: 'hardly'"),
        ({"budgets": ["auto"]}, "not a budget: 'auto'"),
        ({"strategies": ["chen"]}, "unknown strategy 'chen'"),
        ({"strategies": "none"}, "is a sequence"),
        ({"strategies": [3]}, "a name, a Strategy or a function"),
        (
            {"peers": ["magic"], "measure": True},
            "unknown peer 'magic'; known are .*checkpoint_sqrt",
        ),
        ({"peers": ["checkpoint_sqrt"]}, "peers have measured figures only"),
        ({"repeats": -1}, "repeats must be"),
        ({"workers": 0}, "workers must be"),
        ({"measure": "yes"}, "measure must be"),
        ({"name": 3}, "name must be"),
        ({"progress": "yes"}, "progress must be"),
        ({"time_limit_s": -1}, "time_limit_s must be"),
        ({"gap": float("nan")}, "gap must be"),
    ],
)
def test_arguments_are_read_first(options: dict[str, Any], words: str) -> None:
    """An argument that makes no sense is an error that says so."""
    with pytest.raises(ValueError, match=words):
        predicted(**options)


def test_a_budget_of_a_strategy_that_does_not_apply() -> None:
    """A strategy that has no peak on this model is no budget."""
    with pytest.raises(ValueError, match="the peak of 'megatron_selective' cannot be a budget"):
        predicted(budgets=["megatron_selective"])


def test_progress_counts_every_part() -> None:
    """A listener hears of each part once, and how many there are."""
    heard = []
    predicted(strategies=["none", "auto"], progress=heard.append)
    assert [event.num_done for event in heard] == list(range(5))
    assert heard[-1].num_parts == 5
    assert [event.message for event in heard][2:] == [
        "none at 60%",
        "auto at 60%",
        "none at its own choice",
    ]


def test_the_table_says_everything(measured: Comparison) -> None:
    """Printed: a block for each budget, ours marked, errors in their rows."""
    text = str(measured)
    blocks = [b for b in text.split("\n\n") if not b.startswith(("note: ", "warning: "))]
    assert blocks[0].startswith("small: float32, torch ")
    assert [b.splitlines()[0].split(":")[0] for b in blocks[1:]] == [
        "budget 70%",
        "budget uniform_sqrt",
        "budget 1kB",
        "no budget",
        "other tools, as their users run them",
    ]
    (ours,) = [line for line in blocks[1].splitlines() if " auto " in line]
    assert ours.startswith("*")
    assert "equal" in ours
    assert any("KeyError" in line for line in blocks[1].splitlines() if "broken" in line)


def test_known_peers_are_known() -> None:
    """What the command's help names exists."""
    assert {"checkpoint_per_block", "checkpoint_sqrt"} <= set(PEERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "resnet50"])
def test_models_of_the_zoo(name: str) -> None:
    """On a transformer and a convnet: measured peaks as predicted, bits equal, none below ours."""
    case = ZOO[name]("tiny")
    with case.context():
        found = compare(
            case.make(),
            case.sample(0),
            loss_fn=case.loss_fn,
            budgets=["60%"],
            strategies=["none", "uniform_sqrt", "chen_greedy", "ap_sqrt", "auto"],
            repeats=0,
            time_limit_s=4,
        )
    assert found.below_ours() == ()
    ran = [row for row in found.rows if row.measured is not None]
    assert len(ran) >= 4
    for row in ran:
        assert row.measured is not None
        assert row.predicted_peak_bytes is not None
        assert row.measured.bits == "equal"
        assert abs(row.measured.peak_bytes - row.predicted_peak_bytes) <= 64


def test_min_cut_is_replayed() -> None:
    """PyTorch's partitioner has rows like every other strategy."""
    row = predicted(strategies=["min_cut"]).row("min_cut")
    assert row.error == ""
    assert row.setting
    graph = capture(make(), sample(), loss_fn=square)
    assert row.predicted_peak_bytes is not None
    assert row.predicted_peak_bytes <= replay(graph, Schedule.keep_all(graph)).peak_bytes


def test_the_class_names_the_model() -> None:
    """Without a name the comparison has the model's class."""
    assert predicted(budgets=[], strategies=["none"]).model == Net.__name__


def test_nothing_asked_is_refused() -> None:
    """Without budgets, strategies that need one leave nothing to compare."""
    with pytest.raises(ValueError, match="nothing is asked: budgets is empty, and auto"):
        predicted(budgets=[], strategies=["auto"])
