"""Block plans under FSDP2: two processes, bits of loss and sharded gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from planner import BlockPlan, applied_blocks
from planner.errors import PlanMismatchError

from .small_blocks import batch, small, small_plan

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]


def _sharded(model: nn.Module, *, reshard: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_submodule("layers").children():
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    return model


def _train(model: nn.Module) -> list[Tensor]:
    """Losses and this rank's parts of the gradients, of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(*batch())
        loss.backward()
        found.append(loss.detach())
        found += [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    plan = BlockPlan.load(f"{folder}/plan.json")
    results: dict[str, Any] = {}
    for reshard in (True, False):
        expected = _train(_sharded(small(), reshard=reshard))
        before = _sharded(plan.apply(small()), reshard=reshard)
        after = plan.apply(_sharded(small(), reshard=reshard))
        for when, model in (("before", before), ("after", after)):
            found = _train(model)
            applied = applied_blocks(model)
            assert applied is not None
            results[f"{when}, {reshard}"] = (
                len(found) == len(expected) and all(map(torch.equal, found, expected)),
                applied.planned_steps,
            )
    other = small()
    other.layers[0].up = nn.Linear(16, 60)
    try:
        plan.apply(_sharded(other, reshard=True))
    except PlanMismatchError as error:
        results["another shape"] = str(error)
    torch.save(results, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has seen."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    small_plan().save(folder / "plan.json")
    mp.spawn(_work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_bits_are_those_of_fsdp_without_a_plan(
    found: list[dict[str, Any]], when: str, reshard: bool
) -> None:
    """Applied before and after sharding, on both ranks, in two planned steps."""
    assert [rank[f"{when}, {reshard}"] for rank in found] == [(True, 2), (True, 2)]


def test_a_sharded_block_of_another_shape_is_refused_when_applied(
    found: list[dict[str, Any]],
) -> None:
    """By the whole shape of its parameter, on both ranks."""
    assert all("layers.0" in rank["another shape"] for rank in found)
    assert all("has shape (60, 16), planned was (64, 16)" in r["another shape"] for r in found)
