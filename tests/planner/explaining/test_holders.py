"""What is in memory at a plan's peak, and why, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graph_capture.cost_graph import CostGraph, Operator, Storage
from planner import Plan, Why, optimize
from planner.explaining.holders import Holder, holders_at_peak
from solvers.schedule import Schedule
from tests.planner.small import make, plan_for, sample, square


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan of a captured model that recomputes."""
    return plan_for(make(), sample(), loss_fn=square, optimizer="adamw")


def test_holders_and_scratch_are_the_peak(plan: Plan) -> None:
    """To the byte, by category, too."""
    explained = plan.explain(more=0)
    holders = explained.holders
    assert sum(h.size_bytes for h in holders) + explained.workspace_bytes == plan.memory.total_bytes
    by_category: dict[str, int] = {}
    for holder in holders:
        by_category[holder.category] = by_category.get(holder.category, 0) + holder.size_bytes
    said = dict(plan.memory.by_category)
    assert said.pop("workspace", 0) == explained.workspace_bytes
    assert by_category == {name: size for name, size in said.items() if size}
    assert [h.size_bytes for h in holders] == sorted((h.size_bytes for h in holders), reverse=True)


def test_what_is_freed_is_freed_after_the_peak(plan: Plan) -> None:
    """And within the step."""
    explained = plan.explain(more=0)
    assert all(explained.peak_us <= h.freed_us <= explained.step_us for h in explained.holders)


def _chain(*, pinned: str | None = None, at: int = 1) -> CostGraph:
    """Four forward operators of 1, 2, 4, 8 ns, whose outputs the backward pass reads.

    The peak is at the first backward operator, ``b3``, which needs scratch.
    """
    sizes = (10, 10, 10, 10)
    operators = [
        Operator(
            name=f"f{i}",
            inputs=(i - 1,) if i else (8,),
            outputs=(i,),
            cost_ns=2**i,
            pinned=pinned if i == at else None,
        )
        for i in range(4)
    ]
    operators.append(Operator(name="loss", target="loss", inputs=(3,), outputs=(4,), phase="loss"))
    operators += [
        Operator(
            name=f"b{i}",
            inputs=(i, 7 - i),
            outputs=(8 - i,),
            phase="backward",
            workspace_bytes=50 if i == 3 else 0,
        )
        for i in (3, 2, 1)
    ]
    storages = [Storage(name=f"a{i}", size_bytes=size, producer=i) for i, size in enumerate(sizes)]
    storages += [Storage(name=f"g{i}", size_bytes=1, producer=i) for i in (4, 5, 6)]
    storages.append(Storage(name="grad", size_bytes=1, producer=7, category="gradient", kept=True))
    storages.append(Storage(name="x", size_bytes=5, producer=None, category="input"))
    return CostGraph(tuple(operators), tuple(storages))


def _held(plan: Plan, graph: CostGraph, order: tuple[int, ...]) -> dict[str, Holder]:
    record = replace(plan, graph=graph, schedule=Schedule(order))
    return {holder.storage: holder for holder in holders_at_peak(record)}


def test_reasons_and_costs_by_hand(plan: Plan) -> None:
    """Everything saved: each is needed later, and made again from what is there then."""
    held = _held(plan, _chain(), tuple(range(8)))
    assert held["x"].why is Why.RESIDENT
    assert held["a3"].why is Why.IN_USE
    assert held["a1"].why is Why.SAVED
    assert held["a1"].recompute_us == 0.003  # f0 and f1: a0 is gone by then
    assert (held["a1"].last_used_by, held["a1"].last_used_phase) == ("b1", "backward")
    assert held["a1"].freed_us == 0.015


def test_what_must_run_once_is_kept_for_that(plan: Plan) -> None:
    """The reason is the operator's own, and no other's that reads it while it is there."""
    held = _held(plan, _chain(pinned="draws"), tuple(range(8)))
    assert held["a1"].why is Why.ONLY_ONCE
    assert held["a1"].pinned == "draws"
    assert held["a1"].recompute_us is None
    assert held["a2"].why is Why.SAVED
    assert held["a2"].also_needed == ()


@pytest.mark.parametrize(
    ("order", "why"),
    [(range(8), Why.SAVED), ((0, 1, 2, 3, 4, 1, 5, 6, 7), Why.MADE_AGAIN)],
)
def test_what_is_made_from_it_names_it(plan: Plan, order, why) -> None:
    """A result can be made again if what runs once is kept for that, and may have been already."""
    held = _held(plan, _chain(pinned="draws", at=0), tuple(order))
    assert (held["a1"].why, held["a1"].pinned) == (why, "")
    assert held["a1"].recompute_us == 0.002  # f1 alone
    assert [(one.made_by, one.size_bytes, one.pinned) for one in held["a1"].also_needed] == [
        ("f0", 10, "draws")
    ]


def test_what_was_recomputed_early_is_told_apart(plan: Plan) -> None:
    """A second version of a1, made before the peak for a use behind it."""
    held = _held(plan, _chain(), (0, 1, 2, 3, 4, 0, 1, 5, 6, 7))
    assert held["a1"].why is Why.MADE_AGAIN


def test_a_plan_that_recomputes_nothing_explains_itself() -> None:
    """There is nothing that more memory could buy."""
    plan = optimize(make(), sample(), budget="100%", loss_fn=square)
    explained = plan.explain()
    assert explained.more is None
    assert explained.recomputations == ()
    assert "Nothing is recomputed: more memory buys nothing" in str(explained)
