"""Layers that are compiled each by itself share one budget, and one plan of their code."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.cost_graph import CostGraph, Operator, Storage
from planner import InfeasibleBudgetError, PlanError, PlanWarning
from planner.base.budget import Budget
from planner.base.solve_options import SolveOptions
from planner.compiled import CompiledPlan, repeated_calls
from planner.compiled.priced_step import PricedStep
from planner.compiled.repeated_calls import RepeatedCalls, saved_bytes, share_among
from planner.measuring.measure import measure
from solvers.replay import replay
from solvers.schedule import Schedule
from tests.planner.compiled.models import Block, assert_same, step

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:compiled graphs run 4 times",
        "ignore:a compiled graph is only a part",
        "ignore:a graph break cuts",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # Dynamo reads it
    )
]

NUM_LAYERS = 4


class _Layer(Block):
    """A block with a buffer of its own and a loss of its own, as a mixture of experts has one."""

    def __init__(self) -> None:
        super().__init__(32)
        self.register_buffer("mask", torch.randn(128, 128) / 11)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(self.mask @ x)
        return x, x.abs().mean()


class _Layers(nn.Module):
    """Layers, with the loss outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        others = torch.zeros(())
        for layer in self.layers:
            x, other = layer(x)
            others = others + other
        return x.square().mean() + others


def _by_layers(**options: Any) -> tuple[nn.Module, Tensor, list[CompiledPlan]]:
    """A model whose layers are compiled each by itself; the loss runs as plain Python."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, plans = _Layers(), []  # type: tuple[_Layers, list[CompiledPlan]]
    lower = options.pop("lower", "aot_eager")
    given = {"lower": lower, "on_plan": plans.append, **options}
    for layer in model.layers:
        if options:
            layer.compile(backend="remat", options=given)
        else:
            layer.compile(backend=lower)
    return model, torch.randn(128, 32), plans


@pytest.fixture(scope="module")
def unbudgeted() -> tuple[dict[str, Tensor], int]:
    """What a step computes, and what it takes."""
    model, x, _ = _by_layers()
    return step(model, model, x), _peak(model, x)


def _peak(model: nn.Module, x: Tensor) -> int:
    model.zero_grad()
    return measure(model, x, repeats=0).peak_bytes


@pytest.mark.parametrize("share", [0.9, pytest.param(0.7, marks=pytest.mark.slow)])
def test_layers_stay_within_one_budget(share: float, unbudgeted: tuple[Any, int]) -> None:
    """With the gradients of the step without a budget, near the prediction."""
    expected, peak_bytes = unbudgeted
    budget_bytes = round(share * peak_bytes)
    model, x, plans = _by_layers(budget_bytes=budget_bytes, calls=NUM_LAYERS)
    with pytest.warns(PlanWarning, match="run 4 times .* resident_bytes="):
        assert_same(step(model, model, x), expected)
    measured = _peak(model, x)
    predicted = max(plan.predicted_peak_bytes for plan in plans)
    assert measured <= predicted <= budget_bytes
    assert measured >= 0.95 * predicted
    assert all(plan.num_recomputed for plan in plans)


def test_more_calls_than_were_said_are_refused(unbudgeted: tuple[Any, int]) -> None:
    """The message names the option."""
    model, x, _ = _by_layers(budget_bytes=round(0.8 * unbudgeted[1]))
    with pytest.raises(PlanError, match=r"option calls, how many there are; by resident_bytes="):
        step(model, model, x)


@pytest.mark.slow
def test_the_least_budget_that_is_named_works(unbudgeted: tuple[Any, int]) -> None:
    """Of the first graph; a later one may name a little more."""
    budget_bytes, found = 1, None
    for _ in range(3):
        model, x, _ = _by_layers(budget_bytes=budget_bytes, calls=NUM_LAYERS)
        try:
            found = step(model, model, x)
            break
        except torch._dynamo.exc.BackendCompilerFailed as error:
            budget_bytes = getattr(error.inner_exception, "min_budget_bytes", 0)
    assert found is not None
    assert_same(found, unbudgeted[0])
    assert _peak(model, x) <= budget_bytes < unbudgeted[1]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_layers_of_inductor_stay_within_one_budget(share: float) -> None:
    """By the code of one layer, which is read."""
    model, x, _ = _by_layers(lower="inductor", budget_gb=1, calls=NUM_LAYERS)
    expected, peak_bytes = step(model, model, x), _peak(model, x)
    model, x, plans = _by_layers(
        lower="inductor", budget_bytes=round(share * peak_bytes), calls=NUM_LAYERS
    )
    found = step(model, model, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    measured = _peak(model, x)
    predicted = max(plan.predicted_peak_bytes for plan in plans)
    assert 0.85 * predicted <= measured <= predicted <= round(share * peak_bytes)


# -- bounds of what is saved ---------------------------------------------------------------


def _drawn(draw: random.Random) -> PricedStep:
    """Forward of four operators in a row, a turn, and a backward that reads them all."""
    storages = [Storage(name="x", size_bytes=10, producer=None, category="parameter")]
    operators = []
    for v in range(4):
        size_bytes = draw.randint(5, 40)
        storages.append(Storage(name=f"a{v}", size_bytes=size_bytes, producer=v))
        operators.append(
            Operator(name=f"f{v}", inputs=(v,), outputs=(v + 1,), cost_ns=draw.randint(1, 30))
        )
    storages.append(Storage(name="g", size_bytes=8, producer=4, category="gradient"))
    operators.append(
        Operator(name="turn", inputs=(4,), outputs=(5,), phase="loss", pinned="the loop's")
    )
    for v in range(4):
        storages.append(Storage(name=f"b{v}", size_bytes=8, producer=5 + v))
        operators.append(
            Operator(
                name=f"d{v}",
                inputs=(4 - v, 5 + v),
                outputs=(6 + v,),
                cost_ns=draw.randint(1, 30),
                phase="backward",
            )
        )
    graph = CostGraph(tuple(operators), tuple(storages))
    return PricedStep(
        step=SimpleNamespace(),  # type: ignore[arg-type]
        graph=graph,
        groups=((),) * len(operators),
        turn=4,
        state_of={},
        state_nodes={},
        storage_of={},
        device=torch.device("cpu"),
    )


def _brute(priced: PricedStep, calls: RepeatedCalls, usable_bytes: int) -> int | None:
    """The least time of forward in order, backward, and any operators again before each."""
    best = None
    again = [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]
    for repeated in itertools.product(again, repeat=3):
        order = [0, 1, 2, 3, 4, 5]
        for v, before in enumerate(repeated):
            order += [*before, 6 + v]
        schedule = Schedule(tuple(order))
        try:
            outcome = replay(priced.graph, schedule)
        except ValueError:
            continue
        if outcome.peak_bytes + calls.others_bytes(saved_bytes(priced, schedule)) <= usable_bytes:
            best = outcome.cost_ns if best is None else min(best, outcome.cost_ns)
    return best


def test_what_is_found_leaves_the_other_calls_room() -> None:
    """And is about as fast as the fastest of all, where there is one."""
    draw = random.Random(0)
    lost, num_found = 0.0, 0
    refused: list[tuple[int | None, bool]] = []
    for _ in range(8):
        priced = _drawn(draw)
        calls = RepeatedCalls(num_calls=draw.randint(2, 5), weight_bytes=3, gradient_bytes=20)
        everything = replay(priced.graph, Schedule.keep_all(priced.graph)).peak_bytes
        most = everything + calls.others_bytes(saved_bytes(priced, Schedule.keep_all(priced.graph)))
        usable_bytes = round(draw.uniform(0.5, 1.0) * most)
        budget = Budget(total_bytes=usable_bytes, headroom_bytes=0)
        best_ns = _brute(priced, calls, usable_bytes)
        try:
            shared = share_among(priced, calls, budget, SolveOptions(time_limit_s=2.0))
        except InfeasibleBudgetError as error:
            refused.append((best_ns, (error.min_budget_bytes or 0) > usable_bytes))
            continue
        assert shared.schedule is not None
        outcome = replay(priced.graph, shared.schedule)
        others_bytes = calls.others_bytes(saved_bytes(priced, shared.schedule))
        assert outcome.peak_bytes + others_bytes <= usable_bytes
        if best_ns is not None:
            lost, num_found = lost + outcome.cost_ns / best_ns - 1, num_found + 1
    assert set(refused) <= {(None, True)}
    assert num_found >= 4
    assert lost / num_found <= 0.02


def test_another_process_does_not_search_again(
    choices_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much a call may save is kept beside Inductor's cache; a damaged file is said."""
    priced, calls = _drawn(random.Random(1)), RepeatedCalls(num_calls=3)
    budget = Budget(total_bytes=300, headroom_bytes=0)
    first = share_among(priced, calls, budget, SolveOptions(time_limit_s=1.0), kept_for="a step")
    search = repeated_calls.search
    monkeypatch.setattr(repeated_calls, "search", None)
    again = share_among(priced, calls, budget, SolveOptions(time_limit_s=1.0), kept_for="a step")
    assert again.priced.graph == first.priced.graph != priced.graph
    (kept,) = choices_folder.glob("remat/*/*.json")
    for text in ("0", "[1]", "1e9", "nothing"):
        kept.write_text(text)
        monkeypatch.setattr(repeated_calls, "search", search)
        with pytest.warns(PlanWarning, match=r"cannot be used .*: the plan is made again"):
            share_among(priced, calls, budget, SolveOptions(time_limit_s=1.0), kept_for="a step")


def test_what_other_calls_hold() -> None:
    """Weights, and what is saved or the gradients: both where gradients are there before."""
    calls = RepeatedCalls(num_calls=3, weight_bytes=100, gradient_bytes=90)
    assert calls.others_bytes(50) == 2 * (100 + 90)
    assert calls.others_bytes(95) == 2 * (100 + 95)
    calls = RepeatedCalls(num_calls=3, weight_bytes=100, gradient_bytes=90, accumulates=True)
    assert calls.others_bytes(50) == 2 * (100 + 90 + 50)
    assert RepeatedCalls().others_bytes(10**6) == 0
