"""Plans at many budgets from one capture."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from planner import BlockPlan, frontier, optimize
from planner.blocks import captured_blocks, make_blocks
from tests.planner.blocks.small_blocks import batch, small

IN_BLOCKS = {"granularity": "blocks", "blocks": "layers.*"}


@pytest.mark.parametrize("options", [{}, IN_BLOCKS])
def test_more_memory_never_takes_more_time(options: dict[str, str]) -> None:
    """Five budgets, in any order: each plan fits its own and is no slower than the one below."""
    budgets = ["100%", "65%", "70%", "80%", "90%"]
    found = frontier(small(), batch(), budgets=budgets, time_limit_s=0.6, **options)  # type: ignore[arg-type]
    assert len(found.plans) == 5
    assert all(plan.predicted_peak_bytes <= plan.budget_bytes for plan in found.plans)
    assert found.plans[0].overhead > 0
    for lower, upper in pairwise(found.plans):
        assert lower.budget_bytes < upper.budget_bytes
        assert lower.predicted_step_us >= upper.predicted_step_us
    assert {type(plan) is BlockPlan for plan in found.plans} == {bool(options)}


def test_a_plan_is_what_optimize_makes_of_its_budget() -> None:
    """At 75 %: the same bound to the gap, and the plan trains the model with eager's bits."""
    model, sample = small(), batch()
    found = frontier(model, sample, budgets=["75%", "90%"], time_limit_s=1.0, **IN_BLOCKS)  # type: ignore[arg-type]
    alone = optimize(model, sample, budget="75%", time_limit_s=1.4, **IN_BLOCKS)  # type: ignore[arg-type]
    ours = found.plans[0]
    assert ours.budget_bytes == alone.budget_bytes
    assert ours.predicted_step_us == pytest.approx(alone.predicted_step_us, rel=2e-3)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        model(*sample).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    eager = gradients()
    ours.apply(model)
    assert all(map(torch.equal, eager, gradients()))


def test_all_budgets_share_one_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds find the one distinct block, whatever the number of budgets."""
    captures = []
    capture_step = captured_blocks.capture_step

    def counted(*args: object, **options: object) -> object:
        captures.append(args)
        return capture_step(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(captured_blocks, "capture_step", counted)
    frontier(small(), batch(), budgets=["90%", "100%"], time_limit_s=0.3, **IN_BLOCKS)  # type: ignore[arg-type]
    few = len(captures)
    frontier(
        small(),
        batch(),
        budgets=["80%", "85%", "90%", "95%", "100%"],
        time_limit_s=0.3,
        **IN_BLOCKS,
    )  # type: ignore[arg-type]
    assert 0 < len(captures) - few == few


def test_what_nothing_fits_in_says_the_least() -> None:
    """One byte cannot hold the step; the other budget still has its plan, and a pick is made."""
    found = frontier(small(), batch(), budgets=["4096B", "100%"], time_limit_s=0.5)
    first, second = found.points
    assert first.plan is None
    assert first.least_budget_bytes is not None
    assert first.least_budget_bytes > 4096
    assert found.within(2**40) is second.plan
    assert found.within(4096) is None
    assert "no plan; the least known to work is" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["points"][0]["least_budget_bytes"]


@pytest.mark.parametrize("budgets", [1, True, 0])
def test_one_budget_is_no_frontier(budgets: int) -> None:
    """The least and the peak without a plan are two."""
    with pytest.raises(ValueError, match="budgets is a number from 2 on"):
        frontier(small(), batch(), budgets=budgets)


def test_so_many_budgets_are_bytes() -> None:
    """Nobody asks for thousands of plans."""
    with pytest.raises(ValueError, match=r"write budgets=\[4096\] for one of so many bytes"):
        frontier(small(), batch(), budgets=4096)


def test_an_empty_list_of_budgets_is_refused() -> None:
    """And not answered with no points."""
    with pytest.raises(ValueError, match="budgets has none"):
        frontier(small(), batch(), budgets=[])


def test_where_the_optimizer_needs_most_no_block_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AdamW's step holds more than any block of one row: the least memory is found at once."""

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("a block was searched for its least memory")

    monkeypatch.setattr("solvers.block_plans.least.add_lean_points", never)
    make_blocks._least_known.clear()
    found = frontier(
        small(),
        batch(rows=1),
        budgets=2,
        optimizer="adamw",
        time_limit_s=0.3,
        **IN_BLOCKS,  # type: ignore[arg-type]
    )
    assert found.points[0].plan is not None
