"""What plans of whole steps can do and plans in blocks cannot, each refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from planner import BlockPlan, PlanError, PlanSet, optimize, watch

from .small_blocks import batch, small, small_plan

IN_BLOCKS: dict[str, Any] = {"budget": "70%", "granularity": "blocks", "time_limit_s": 0.2}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: optimize(small(), batch(), concurrent_calls=2, **IN_BLOCKS),
            r"concurrent_calls= is for a plan of the whole step.*granularity='step'",
        ),
        (
            lambda: optimize(small(), batch(), shapes="sample", **IN_BLOCKS),
            r"shapes= is for a plan of the whole step.*granularity='step'",
        ),
        (
            lambda: small_plan().apply(small(), on_shape_change="adapt"),
            r"got 'adapt': a block cannot plan another shape.*granularity='step'\), which adapts",
        ),
        (
            lambda: watch(small(), budget_gb=1, granularity="blocks"),
            r"a first call is planned as a whole step; to plan in blocks, watch\(model\) without",
        ),
        (
            lambda: watch(small(), budget_gb=1, blocks="layers.*"),
            r"a first call is planned as a whole step; to plan in blocks, watch\(model\) without",
        ),
        (
            lambda: optimize(small(), batch(), budget="70%", blocks="layers.*"),
            r"blocks='layers\.\*' is for plans in blocks: add granularity='blocks'",
        ),
        (lambda: small_plan().for_call(small(), batch()), r"plan another call in blocks with opt"),
        (lambda: PlanSet((small_plan(),)), r"holds plans of whole steps, and this is a BlockPlan"),
    ],
    ids=["concurrent", "shapes", "adapt", "watch", "watch blocks", "blocks", "for_call", "set"],
)
def test_it_is_refused_by_name_with_the_next_step(call: Callable[[], Any], words: str) -> None:
    """Before anything is planned."""
    with pytest.raises((ValueError, PlanError), match=words):
        call()


def test_a_plan_of_the_whole_step_names_plans_inside() -> None:
    """Where they are in the way of its capture, and what to call first."""
    whole = optimize(small(), batch(), budget="90%", time_limit_s=0.2)
    model = small_plan().apply(small())
    with pytest.raises(PlanError, match=r"'layers\.0' inside this Small has .*BlockPlan\.remove"):
        whole.apply(model)
    whole.apply(BlockPlan.remove(model))
