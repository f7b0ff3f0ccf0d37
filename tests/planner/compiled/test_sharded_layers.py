"""Layers that are compiled each by itself and sharded by FSDP2, two processes, one budget."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import PlanWarning
from planner.measuring.measure import measure
from tests.planner.compiled.models import WithLoss
from tests.ranks import spawn_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

NUM_LAYERS = 4
NUM_RECORDS = 8
"""Gloo's threads at times free a buffer, which the recorder does not hear of: the least counts."""


def _sharded(**options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.compiler.reset()
    torch.manual_seed(0)
    model = WithLoss(NUM_LAYERS, 64)
    for layer in model.blocks:
        if options:
            layer.compile(backend="remat", options=options)
        else:
            layer.compile(backend="aot_eager")
        fully_shard(layer)
    return fully_shard(model)


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss = model(x)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.to_local().clone()  # type: ignore[attr-defined]
    model.zero_grad()
    return found


def _peak(model: nn.Module, x: Tensor) -> int:
    return min(measure(model, x, repeats=0).peak_bytes for _ in range(NUM_RECORDS))


def _work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore", PlanWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, plans = torch.randn(256, 64), []  # type: tuple[Tensor, list[Any]]
    model = _sharded()
    expected, budget_bytes = _step(model, x), round(0.7 * _peak(model, x))
    options = {"budget_bytes": budget_bytes, "lower": "aot_eager", "on_plan": plans.append}
    model = _sharded(calls=NUM_LAYERS, **options)
    found = {
        "expected": expected,
        "found": _step(model, x),
        "budget": budget_bytes,
        "predicted": max(plan.predicted_peak_bytes for plan in plans),
        "measured": _peak(model, x),
    }
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_layers_of_a_sharded_model_stay_within_one_budget(tmp_path: Path) -> None:
    """With the gradients of the step without a budget, on each rank; the plan counts weights of
    other layers as if they were not sharded again."""
    spawn_ranks(_work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / str(rank))
        assert_same_tensors(found["expected"], found["found"])
        assert found["predicted"] <= found["budget"]
        assert 0.6 * found["predicted"] <= found["measured"] <= 1.01 * found["predicted"]
        assert found["measured"] <= found["budget"]
