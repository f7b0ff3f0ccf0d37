"""Plans for one rank of ``fully_shard``, made and looked at in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from planner import BlockPlan, PlanError, PlanWarning, optimize

from .small_blocks import ROWS, batch, deep, deep_plan, small, small_plan

ASKED = {
    "budget": "80%",
    "granularity": "blocks",
    "blocks": "layers.*",
    "distributed": "fsdp2:ranks=2",
    "time_limit_s": 0.6,
}


def test_shards_gradients_and_state_are_half_and_gathered_parameters_are_counted() -> None:
    """By hand: a rank has 6,603 elements of parameters, padding included."""
    plan = deep_plan("fsdp2:ranks=2")
    layer = sum(-(-p.shape[0] // 2) * p[0].numel() for p in deep().layers[0].parameters())
    others = [*deep().embed.parameters(), *deep().head.parameters()]
    root = sum(-(-p.shape[0] // 2) * p[0].numel() for p in others)
    shards = (6 * layer + root) * 4
    assert plan.memory.by_category["parameter"] == shards == 4 * 6_603
    assert plan.memory.by_category["optimizer_state"] == 2 * shards + 4 * (6 * 6 + 4)
    by_name = {s.name: s for s in plan.graph.storages}
    assert by_name["fsdp2/layers.0/gathered"].size_bytes == 2 * layer * 4
    assert by_name["fsdp2/layers.0/sharded_gradients"].size_bytes == layer * 4
    assert by_name["fsdp2/root/all_gather"].size_bytes == 2 * root * 4
    assert "one rank's part of fsdp2:ranks=2" in str(plan)
    assert plan.parts.whole is None
    with pytest.raises(PlanError, match="the plan is for one rank of fsdp2:ranks=2"):
        plan.validate(deep(), batch(ROWS))


def test_a_file_says_how_the_model_is_sharded(tmp_path: Path) -> None:
    """It is read back as written; one whose storages do not fit the word is refused."""
    plan, path = deep_plan("fsdp2:ranks=2,reshard_after_forward=False"), tmp_path / "plan.json"
    plan.save(path)
    assert BlockPlan.load(path).holds == plan.holds
    data = json.loads(path.read_text())
    del data["step"]["loop_holds"]["distributed"]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"what is gathered and loop_holds\.distributed"):
        BlockPlan.load(path)


def test_a_plan_for_shards_that_runs_without_them_says_so() -> None:
    """Once for all blocks, in the first step; a plan without the word says nothing."""
    model = deep_plan("fsdp2:ranks=2").apply(deep())
    with pytest.warns(PlanWarning, match="is not sharded by itself, and its plan counts") as said:
        model(*batch(ROWS)).backward()
    assert len([w for w in said if w.category is PlanWarning]) == 1
    model.zero_grad()
    model(*batch(ROWS)).backward()
    small_plan().apply(small())(*batch()).backward()


def test_a_plan_comes_from_a_model_without_data() -> None:
    """On ``meta``, with the same bytes as from the model itself."""
    real = optimize(deep(), batch(ROWS), **ASKED)
    bare = optimize(deep().to("meta"), tuple(t.to("meta") for t in batch(ROWS)), **ASKED)
    assert real.baseline_peak_bytes == bare.baseline_peak_bytes
    assert real.budget_bytes == bare.budget_bytes


def test_parameters_that_cannot_be_sharded_are_refused() -> None:
    """One that two blocks share, and one without dimensions."""
    model = deep()
    model.layers[1].up.bias = model.layers[0].up.bias
    with pytest.raises(ValueError, match="one parameter, and fully_shard cannot"):
        optimize(model, batch(ROWS), **ASKED)
    model = deep()
    model.scale = nn.Parameter(model.head.bias.detach().sum())
    with pytest.raises(ValueError, match="without dimensions"):
        optimize(model, batch(ROWS), **ASKED)


def test_gradients_that_a_plan_in_blocks_does_not_count_are_said_once() -> None:
    """Where the budget of the whole step has no room for them, whatever a block alone has."""
    plan = small_plan()
    tight = replace(plan, budget_bytes=plan.predicted_peak_bytes)
    model = tight.apply(small())
    model(*batch()).backward()
    with pytest.warns(PlanWarning, match="of gradients are there when a planned step") as said:
        model(*batch()).backward()
    assert len(said) == 1
    model(*batch()).backward()
    model = replace(plan, budget_bytes=2 * plan.predicted_peak_bytes).apply(small())
    for _ in range(2):
        model(*batch()).backward()
