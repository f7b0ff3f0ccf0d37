"""Two processes under DistributedDataParallel: equal bits, and gradients that leave early."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.testing.bitwise import assert_same_tensors
from planner import Plan, PlanWarning, optimize
from tests.planner.small import make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

WIDTH, LAYERS, STEPS = 512, 6, 3


class Deep(nn.Module):
    """1 MB of gradients a layer, so that each layer is a segment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.dropout = nn.Dropout(0.1)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + self.dropout(torch.tanh(layer(x)))
        return {"loss": x.square().mean(), "x": x}


def loss_of(output: dict[str, Tensor]) -> Tensor:
    return output["loss"]


def call(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(1024, WIDTH, generator=generator)}


def deep(options: dict[str, Any]) -> nn.Module:
    """With a layer that nothing uses, frozen where DistributedDataParallel minds that."""
    model = make(Deep)
    model.unused.requires_grad_("find_unused_parameters" in options)
    return model


@dataclass
class Found:
    """What one process saw of one way to train."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    before_first_bucket: list[int] = field(default_factory=list)


def train(rank: int, options: dict[str, Any], plan: Plan | None) -> Found:
    """Some steps."""
    model = deep(options)
    if plan is not None:
        plan.apply(model)
    wrapper = DistributedDataParallel(model, bucket_cap_mb=1, **options)
    found, arrived, buckets = Found(), [0], [0]

    def reduce(_state, bucket):  # type: ignore[no-untyped-def]  # it wants no annotations as text
        if not buckets[0]:
            found.before_first_bucket.append(arrived[0])
        buckets[0] += 1
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapper.register_comm_hook(None, reduce)
    for layer in model.layers:
        layer.weight.register_hook(lambda _: arrived.__setitem__(0, arrived[0] + 1))
    for step in range(STEPS):
        wrapper.zero_grad()
        arrived[0] = buckets[0] = 0
        torch.manual_seed(step)
        loss_of(wrapper(**call(10 * step + rank))).backward()
        found.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    return found


WAYS: list[dict[str, Any]] = [
    {},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
    {"find_unused_parameters": True},
]


def work(rank: int, folder: str) -> None:
    """Train in one process and write down what was seen."""
    warnings.simplefilter("ignore", PlanWarning)  # of the buckets, which another test is for
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    results = []
    for options in WAYS:
        plan = optimize(deep(options), call(0), budget="80%", loss_fn=loss_of, time_limit_s=3)
        assert plan.schedule.recomputed()
        results.append([train(rank, options, which) for which in (None, plan)])
    torch.save(
        [[(f.gradients, f.before_first_bucket) for f in pair] for pair in results],
        f"{folder}/{rank}",
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """For each way to train what eager and what a plan did, in the first process."""
    folder: Path = tmp_path_factory.mktemp("ddp")
    mp.spawn(work, (str(folder),), nprocs=2)
    one, other = (torch.load(folder / str(rank)) for rank in range(2))
    for eager, planned in other:
        for before, after in zip(eager[0], planned[0], strict=True):
            assert_same_tensors(before, after)
    return one


@pytest.mark.parametrize("way", range(len(WAYS)), ids=map(str, WAYS))
def test_gradients_are_equal_and_leave_before_the_end(found: list[Any], way: int) -> None:
    """The first all-reduce starts as early as in eager, give or take two layers."""
    (expected, eager), (gradients, planned) = found[way]
    for before, after in zip(expected, gradients, strict=True):
        assert_same_tensors(before, after)
    for early, late in zip(eager, planned, strict=True):
        assert late <= early + 2 < LAYERS or early == LAYERS
