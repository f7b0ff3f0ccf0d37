"""Calls that wait for their backward pass count, whoever made them and however often."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import PlanError, PlanWarning
from planner.compiled.options import CompiledOptions
from planner.compiled.partition import Partitioner
from planner.compiled.step_so_far import StepSoFar
from planner.measuring.measure import measure
from tests.planner.compiled.models import Block, assert_same, compiled, model_and_sample, step

pytestmark = pytest.mark.filterwarnings(
    "ignore:a compiled graph is only a part",
    "ignore:a graph break cuts",
    "ignore:a part of a training step runs as plain Python",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # Dynamo reads it
)


class _Repeated(nn.Module):
    """Blocks of one code, with a graph break after each: Dynamo compiles it once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Breaking() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class _Breaking(Block):
    def __init__(self) -> None:
        super().__init__(32)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        torch._dynamo.graph_break()
        return x


def _repeated() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _Repeated(), torch.randn(128, 32)


BUDGET_BYTES = 712_000  # 0.9 of what the three blocks take without a budget


def test_a_graph_that_runs_for_several_layers_counts_each_time() -> None:
    """A budget that its plan keeps for one layer alone is refused, and says how much to count."""
    model, x = _repeated()
    call, plans = compiled(model, budget_bytes=BUDGET_BYTES)
    with pytest.raises(
        PlanError, match=r"A graph runs several times.* later_bytes=214912 anything"
    ):
        step(model, call, x)
    assert all(plan.predicted_peak_bytes <= BUDGET_BYTES for plan in plans)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a part of a training step runs as plain Python")
def test_layers_of_one_code_share_a_budget() -> None:
    """With less to save, all layers fit, and gradients are those of the unbudgeted step."""
    model, x = _repeated()
    torch.compiler.reset()
    expected = step(model, torch.compile(model, backend="aot_eager"), x)
    call, _ = compiled(model, budget_bytes=BUDGET_BYTES, later_bytes=150_000)
    assert_same(step(model, call, x), expected)
    assert measure(call, x, repeats=0).peak_bytes <= BUDGET_BYTES


def test_two_calls_before_backward_are_refused_where_they_do_not_fit() -> None:
    """With one call each the same budget holds, also after the refusal."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=480_000)
    first = step(model, call, x)["loss"]
    model.zero_grad()
    with pytest.raises(PlanError, match=r"several calls before backward.*resident_bytes=\d+"):
        (call(x) + call(x)).backward()
    assert torch.equal(step(model, call, x)["loss"], first)


def test_calls_that_are_dropped_do_not_count() -> None:
    """A result that nobody keeps, or whose backward pass has run, holds nothing."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=480_000)
    kept = []
    for _ in range(3):
        call(x)
        loss = call(x)
        loss.backward()
        model.zero_grad()
        kept.append(loss)


def test_plain_python_between_graphs_counts() -> None:
    """What it saves for its backward pass is in the second graph's plan."""

    def plans_of(between: Any) -> list[int]:
        torch.manual_seed(0)
        first, last, x = Block(32), Block(32), torch.randn(128, 32)
        between = torch.compiler.disable(between)
        torch.compiler.reset()

        def forward(x: Tensor) -> Tensor:
            found: Tensor = last(between(first(x))).square().mean()
            return found

        call, plans = compiled(forward, budget_bytes=10**6)  # type: ignore[arg-type]
        call(x).backward()
        return [plan.graph.resident_bytes for plan in plans]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few, many = plans_of(lambda x: x), plans_of(lambda x: x.exp().sin())
    assert few[0] == many[0]
    assert many[1] == few[1] + 128 * 32 * 4  # exp's result; sin's is the second graph's input


class _WithLogits(nn.Module):
    """A block, logits and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = Block(32), nn.Linear(32, 96)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.out(self.block(x))
        return logits.square().mean(), logits


def test_a_second_loss_outside_is_said_once() -> None:
    """Its memory is in no plan; a loop that differentiates the graph's loss alone is not told."""
    torch.manual_seed(0)
    model, x = _WithLogits(), torch.randn(128, 32)
    call, _ = compiled(model, budget_bytes=10**6)
    call(x)[0].backward()  # warnings are errors
    with pytest.warns(PlanWarning, match="other results are differentiated, too"):
        sum(t.mean() for t in call(x)).backward()
    sum(t.mean() for t in call(x)).backward()


@pytest.mark.parametrize("share", [1.0, 0.95])
@pytest.mark.filterwarnings("ignore:a compiled graph has a loss, and its other results")
def test_gradients_of_other_results_are_in_the_plan(share: float) -> None:
    """A second loss that takes nothing but its gradient leaves the peak as it is predicted."""
    torch.manual_seed(0)
    model, x, weights = _WithLogits(), torch.randn(128, 32), torch.randn(128, 96)
    call, plans = compiled(model, budget_bytes=int(share * 430_000))

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = call(x)
        return loss + (logits * weights).sum(), logits

    step(model, lambda x: both(x)[0], x)
    measured = measure(call, x, loss_fn=lambda made: _second(made, weights), repeats=0).peak_bytes
    few_bytes = measured - 4 * weights.numel() - plans[0].predicted_peak_bytes
    assert few_bytes == 4  # the second loss


def _second(made: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    return made[0] + (made[1] * weights).sum()


def test_a_partitioner_keeps_no_batch() -> None:
    """Within ``install`` it lives as long as the training loop."""
    partitioner = Partitioner(CompiledOptions.of({"budget_gb": 1}), so_far=StepSoFar())
    batch = torch.randn(4)
    kept = weakref.ref(batch)
    partitioner.compiled(lambda: torch.sin, [batch])
    del batch
    assert kept() is None
