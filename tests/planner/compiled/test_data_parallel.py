"""Compiled steps within a budget in two processes under DistributedDataParallel."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.testing.bitwise import assert_same_tensors
from planner import PlanWarning
from tests.planner.compiled.models import compiled, model_and_sample, step
from tests.ranks import spawn_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

BUDGET_BYTES = 480_000


def _work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore", PlanWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, x = model_and_sample()
    found: list[Any] = [step(model, model, x * (1 + rank))]  # what is averaged
    for budget_bytes in (10**9, BUDGET_BYTES):
        model, x = model_and_sample()
        wrapper = DistributedDataParallel(model)
        call, plans = compiled(wrapper, budget_bytes=budget_bytes)
        results = step(model, call, x * (1 + rank))
        (plan,) = plans
        found.append((results, plan.num_recomputed, plan.predicted_peak_bytes))
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_gradients_of_two_processes_are_those_without_a_budget(tmp_path: Path) -> None:
    """Averaged over both, to the bit; each process recomputes to stay within its budget."""
    spawn_ranks(_work, (str(tmp_path),), nprocs=2)
    ranks: list[Any] = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for _, (everything, none, _), (within, some, peak_bytes) in ranks:
        assert none == 0 < some
        assert peak_bytes <= BUDGET_BYTES
        assert_same_tensors(everything, within)
    name = "blocks.0.norm.weight"
    (one, _, (averaged, *_)), (other, *_) = ranks
    torch.testing.assert_close(averaged[name], (one[name] + other[name]) / 2)
    assert (averaged[name] - one[name]).abs().max() > 1e-3 * one[name].abs().max()
