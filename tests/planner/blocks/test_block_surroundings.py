"""What the model does around its blocks: autocast regions and checkpoints of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from planner import BlockPlan, PlanError, applied_blocks, measure, optimize

from .small_blocks import Small, batch


class Regions(Small):
    """Some of its blocks run in an autocast region that forward opens."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.layers[0](self.embed(x), scale=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.layers[1](hidden, scale=0.5)
            with torch.autocast("cpu", enabled=False):
                hidden = self.layers[2](hidden.float(), scale=0.5)
        return nn.functional.cross_entropy(self.head(hidden), target)


class Checkpointed(Small):
    """Its middle block is checkpointed in forward."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.layers[0](self.embed(x))
        hidden = checkpoint(self.layers[1], hidden, use_reentrant=self.use_reentrant)
        return nn.functional.cross_entropy(self.head(self.layers[2](hidden)), target)


def _built(build: Any, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: nn.Module = build(**options).train()
    return model


def _steps(model: nn.Module) -> list[Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[Tensor] = []
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        found += [loss.detach(), torch.get_rng_state()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


def _planned(model: nn.Module, budget: str = "85%") -> BlockPlan:
    plan = optimize(
        model, batch(), budget=budget, granularity="blocks", blocks="layers.*", time_limit_s=0.6
    )
    assert isinstance(plan, BlockPlan)
    return plan


def test_a_block_has_the_autocast_of_its_call() -> None:
    """Alike modules under different autocasts have different plans, with eager's bits."""
    plan = _planned(_built(Regions))
    guards = [plan.parts.of(path).guard.autocast for path in plan.blocks]
    assert guards == [None, "bfloat16", None]
    planned = plan.apply(_built(Regions))
    for mine, theirs in zip(_steps(planned), _steps(_built(Regions)), strict=True):
        assert torch.equal(mine, theirs)
    applied = applied_blocks(planned)
    assert applied is not None
    assert (applied.planned_steps, applied.unplanned_steps) == (3, 0)


def test_the_peak_under_regions_of_autocast_is_within_the_budget() -> None:
    """As the allocator records it."""
    plan = _planned(_built(Regions))
    measured = measure(plan.apply(_built(Regions)), batch(), repeats=0)
    assert measured.peak_bytes <= plan.predicted_peak_bytes <= plan.budget_bytes


def test_the_autocast_of_each_block_is_in_the_file(tmp_path: Any) -> None:
    """A plan from a file is compared with each block under the block's own autocast."""
    plan = _planned(_built(Regions))
    plan.save(tmp_path / "plan.json")
    planned = BlockPlan.load(tmp_path / "plan.json").apply(_built(Regions))
    for mine, theirs in zip(_steps(planned), _steps(_built(Regions)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("blocks", ["layers.*", "auto"])
def test_a_checkpointed_block_is_refused_by_name(use_reentrant: bool, blocks: str) -> None:
    """Its plan and the checkpoint would both repeat it; the error says what to switch off."""
    model = _built(Checkpointed, use_reentrant=use_reentrant)
    with pytest.raises(PlanError, match=r"'layers\.1' is called by .* switch\s+gradient"):
        optimize(
            model, batch(), budget="85%", granularity="blocks", blocks=blocks, time_limit_s=0.6
        )


def test_checkpoints_inside_of_blocks_are_looked_through() -> None:
    """The block's plan decides what is repeated inside of it."""
    plan = optimize(
        _built(Checkpointed, use_reentrant=False),
        batch(),
        budget="95%",
        granularity="blocks",
        blocks=("layers.0", "layers.2"),
        time_limit_s=0.6,
    )
    assert isinstance(plan, BlockPlan)
    assert plan.blocks == ("layers.0", "layers.2")


@pytest.mark.parametrize("shares", ["two blocks", "block and head", "nothing"])
def test_a_parameter_that_autocast_casts_once_for_several_modules(shares: str) -> None:
    """Eager adds gradients of the one cast: blocks with a cast of their own have other bits."""
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Sequential(*(_Tanh() for _ in range(2))), nn.Linear(16, 16)
    ).train()
    weight = model[1][0].linear.weight
    if shares == "two blocks":
        model[1][1].linear.weight = weight
    elif shares == "block and head":
        model[2].weight = weight
    x = torch.randn(64, 16)
    words: dict[str, Any] = {"loss_fn": torch.sum, "autocast": torch.bfloat16, "budget_gb": 1}
    words |= {"granularity": "blocks", "time_limit_s": 0.5}
    if shares == "nothing":
        plan = optimize(model, x, blocks="1.*", **words)
        with torch.autocast("cpu", torch.bfloat16):
            assert plan.validate(model, x, repeats=0).bits == "equal"
        return
    with pytest.raises(PlanError, match=r"shares 'linear.weight' .* casts it once"):
        optimize(model, x, blocks="1.*", **words)


class _Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))
