"""Where forward writes over a value that is read: with a copy only where it is read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from graph_capture.cost_graph import CostGraph
from planner import InfeasibleBudgetError, Plan, PlanWarning, measure, optimize
from planner.running.rewrite import rewrite
from solvers.replay import replay
from solvers.schedule import Schedule
from tests.planner.small import make, sample, square

SCALARS_BYTES = 64
"""What prediction and measurement may differ by; a block of these models has 32 kB."""

CLONE = torch.ops.aten.clone.default


class Residual(nn.Module):
    """As in a ResNet: what the branch has read is added to in place."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Sigmoid(), nn.Linear(width, width)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for branch in self.branches:
            h = h * 2
            h += branch(h)
        return h.tanh()


class Hardswish(nn.Module):
    """Autograd keeps a copy of what the activation writes over."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.hardswish(layer(x), inplace=True)
        return x.tanh()


class Masked(nn.Module):
    """Scores that were looked at are masked in place, as in T5."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            scores = self.keys(x) * 0.5
            level = scores.sigmoid()
            scores.masked_fill_(x < 0, -10.0)
            x = self.values(scores.softmax(-1)) * level
        return x


class TwoValues(nn.Module):
    """What a memory held meets what it holds now, in a call that writes in place."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            now = layer(x) * 2
            before = now.clone()
            now.neg_()
            before.add_(now, alpha=-3)
            x = before.tanh()
        return x


class HighWrite(nn.Module):
    """The step needs most while forward writes in place: four large blocks, then small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        large = x.repeat(1, 64)
        level = large.sigmoid()
        large.add_(level)
        return large.sum(1) * self.scale


MODELS = [Residual, Hardswish, Masked, TwoValues]
models = pytest.mark.parametrize("kind", MODELS)


@cache
def with_room(kind: Callable[[], nn.Module]) -> Plan:
    """A plan that has room for everything."""
    return optimize(make(kind), sample(), budget_gb=1, loss_fn=square)


@cache
def plan_at(kind: Callable[[], nn.Module], share: float) -> Plan:
    """A plan at a share of what the step takes beside what is resident; 0 for the least budget."""
    easy = with_room(kind)
    resident = easy.graph.resident_bytes
    budget_bytes = resident + int(share * (easy.predicted_peak_bytes - resident))
    options = {"loss_fn": square, "time_limit_s": 1}
    try:
        return optimize(make(kind), sample(), budget_bytes=budget_bytes, **options)
    except InfeasibleBudgetError as error:
        least = error.min_budget_bytes
        return optimize(make(kind), sample(), budget_bytes=least, **options)


def num_copies(plan: Plan) -> int:
    """Clones in the planned graphs beside those of the model's own step."""
    graphs = rewrite(plan._live.captured, plan.schedule)
    nodes = [*graphs.forward.graph.nodes, *graphs.backward.graph.nodes]
    return sum("_copy" in n.name and n.target is CLONE for n in nodes)


@pytest.mark.parametrize("kind", [*MODELS, HighWrite])
def test_with_room_the_step_is_eagers(kind):
    """No copy, the same time and no more memory, as it was measured."""
    plan = with_room(kind)
    assert any(op.rewrites for op in plan.graph.operators)
    assert plan.overhead == 0
    assert plan.predicted_peak_bytes <= plan.baseline_peak_bytes
    assert num_copies(plan) == 0
    peak = measure(plan.apply(make(kind)), sample(1), loss_fn=square, repeats=0).peak_bytes
    assert peak == pytest.approx(plan.predicted_peak_bytes, abs=SCALARS_BYTES)


def test_a_write_at_the_peak_takes_no_second_block():
    """The predicted peak is the unplanned one where that is at the write: a copy would raise it."""
    plan = with_room(HighWrite)
    assert plan.predicted_peak_bytes == plan.baseline_peak_bytes
    (v,) = (v for v, op in enumerate(plan.graph.operators) if op.rewrites)
    copying = list(plan.graph.operators)
    copying[v] = replace(copying[v], rewrites=())
    graph = CostGraph(tuple(copying), plan.graph.storages)
    assert replay(graph, plan.schedule).peak_bytes > plan.baseline_peak_bytes


@pytest.mark.parametrize("share", [0.6, 0.0])
@models
def test_bits_and_peak_with_repetitions(kind, share):
    """Whatever is repeated, eager's bits within the budget, at the peak that is predicted."""
    plan = plan_at(kind, share)
    assert plan.schedule.recomputed()
    assert plan.lower_bound_us <= plan.predicted_step_us
    planned = assert_same_training(lambda: make(kind), plan.apply, sample, loss_fn=square)
    peak = measure(planned, sample(1), loss_fn=square, repeats=0).peak_bytes
    assert peak <= plan.predicted_peak_bytes <= plan.budget_bytes
    assert peak == pytest.approx(plan.predicted_peak_bytes, abs=SCALARS_BYTES)


@models
def test_what_is_read_again_is_copied(kind):
    """A schedule that repeats readers of what was written over has a copy, priced, and the bits."""
    easy = with_room(kind)
    graph = easy.graph
    v = next(v for v, op in enumerate(graph.operators) if op.rewrites)
    ((old, _, copy_ns),) = graph.operators[v].rewrites
    reader = next(u for u in graph.consumers[old] if u != v)
    (made, *_) = graph.operators[reader].outputs
    last = graph.consumers[made][-1]
    order = list(range(graph.num_operators))
    order.insert(order.index(max(last, v + 1)), reader)
    plan = replace(easy, schedule=Schedule(tuple(order)))
    assert num_copies(plan) == 1
    extra_ns = graph.operators[reader].cost_ns + copy_ns
    assert plan.predicted_step_us * 1e3 == pytest.approx(graph.base_cost_ns + extra_ns)
    assert_same_training(lambda: make(kind), plan.apply, sample, loss_fn=square)


@models
def test_a_second_backward_pass_finds_what_was_saved(kind):
    """What forward saved is not written over by repetitions in backward."""
    plan = plan_at(kind, 0.0)

    def gradients(model: nn.Module) -> list[Tensor | None]:
        loss = square(model(sample(1)))
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in model.parameters()]

    expected = gradients(make(kind))
    with pytest.warns(PlanWarning, match="retain_graph"):
        actual = gradients(plan.apply(make(kind)))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@models
def test_always_recomputing_all_keeps_the_bits(kind):
    """The user's own rule repeats readers and writers alike."""
    forward = [op for op in with_room(kind).graph.operators if op.phase == "forward"]
    free = {target for op in forward if op.pinned is None for target in op.target.split("+")}
    plan = optimize(
        make(kind), sample(), budget_gb=1, loss_fn=square, always_recompute=tuple(sorted(free))
    )
    assert plan.graph.num_operators > with_room(kind).graph.num_operators
    assert_same_training(lambda: make(kind), plan.apply, sample, loss_fn=square)


def older(plan: Plan) -> Plan:
    """The plan as versions before copies could be left out had it."""
    operators = tuple(
        replace(op, cost_ns=op.cost_ns + sum(ns for _, _, ns in op.rewrites), rewrites=())
        for op in plan.graph.operators
    )
    return replace(plan, graph=CostGraph(operators, plan.graph.storages))


@models
def test_a_file_of_before_is_applied(kind, tmp_path: Path):
    """It loads, trains with eager's bits, and takes no more time or memory than it says."""
    before = older(plan_at(kind, 0.6))
    before = replace(before, budget_bytes=max(before.budget_bytes, before.predicted_peak_bytes))
    before.save(tmp_path / "plan.json")
    assert "rewrites" not in (tmp_path / "plan.json").read_text()
    plan = Plan.load(tmp_path / "plan.json")
    planned = assert_same_training(lambda: make(kind), plan.apply, sample, loss_fn=square)
    peak = measure(planned, sample(1), loss_fn=square, repeats=0).peak_bytes
    assert peak <= plan.predicted_peak_bytes


@models
def test_a_file_says_what_is_written_over(kind, tmp_path: Path):
    """A loaded plan is the plan."""
    plan = with_room(kind)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
