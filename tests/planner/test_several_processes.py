"""Models that several processes train: what is refused, and what is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.testing.bitwise import assert_same_tensors
from graph_capture.units import format_bytes
from planner import CaptureError, PlanMismatchError, PlanWarning, applied_plan, optimize
from planner.measuring.measure import record_peak
from tests.planner.small import make, sample, square

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    meeting: Path = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _layers() -> nn.Module:
    return make(lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)))


def _fully_sharded() -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = _layers()
    fully_shard(model[0], mesh=mesh)
    return model


def _flattened() -> nn.Module:
    return FullyShardedDataParallel(_layers(), device_id=torch.device("cpu"))


def _original_parameters() -> nn.Module:
    wrapper = FullyShardedDataParallel(
        _layers(), device_id=torch.device("cpu"), use_orig_params=True
    )
    return wrapper.module


SHARDED = (_fully_sharded, _flattened, _original_parameters)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
@pytest.mark.parametrize("sharded", SHARDED)
def test_a_sharded_model_is_refused_by_that_name(sharded):
    """Planning and applying both say FSDP and what works instead."""
    model = sharded()
    with pytest.raises(CaptureError, match=r"sharded by FSDP.*DistributedDataParallel instead"):
        optimize(model, sample(), budget_gb=1, loss_fn=square)
    plan = optimize(_layers(), sample(), budget_gb=1, loss_fn=square)
    with pytest.raises(
        PlanMismatchError, match=r"sharded by FSDP.*DistributedDataParallel instead"
    ):
        plan.apply(model)


def test_a_wrapper_is_refused_with_what_works():
    """Its forward would no longer tell the others; the module inside is planned and trained."""
    plain, wrapper = DistributedDataParallel(make()), DistributedDataParallel(make())
    with pytest.raises(CaptureError, match=r"optimize\(wrapper\.module"):
        optimize(wrapper, sample(), budget_gb=1, loss_fn=square)
    optimize(wrapper.module, sample(), budget_gb=1, loss_fn=square).apply(wrapper.module)
    found = []
    for model in (plain, wrapper):
        torch.manual_seed(0)
        square(model(sample())).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert_same_tensors(*found)
    assert applied_plan(wrapper.module).planned_steps == 1


@pytest.mark.parametrize("view", [False, True])
def test_buckets_that_a_plan_counts_are_in_its_peak_exactly(view):
    """As resident bytes, or as earlier gradients where gradients are views of them."""
    num_bytes = sum(p.numel() * p.element_size() for p in make().parameters())
    words = {"grads": "accumulated"} if view else {"resident_bytes": num_bytes}
    whole = optimize(make(), sample(), budget_gb=1, loss_fn=square, **words)
    tight = optimize(
        make(), sample(), budget_bytes=whole.predicted_peak_bytes, loss_fn=square, **words
    )
    wrapper = DistributedDataParallel(tight.apply(make()), gradient_as_bucket_view=view)

    def step():
        output = wrapper(sample())
        loss = square(output)
        loss.backward()
        return output, loss

    for _ in range(3):  # the buckets are built again after the first
        wrapper.zero_grad()
        step()
    wrapper.zero_grad()
    there = [*wrapper.parameters(), *wrapper.buffers()]
    resident = sum(t.untyped_storage().nbytes() for t in there) + num_bytes
    added, _ = record_peak(step, torch.device("cpu"), there)
    assert resident + added == whole.predicted_peak_bytes


def test_buckets_that_the_budget_does_not_hold_are_said_once():
    """One set of gradients lies in them; a budget with room for it says nothing."""
    whole = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    tight = optimize(make(), sample(), budget_bytes=whole.predicted_peak_bytes, loss_fn=square)
    num_bytes = sum(p.numel() * p.element_size() for p in make().parameters())
    wrapper = DistributedDataParallel(whole.apply(make()))
    square(wrapper(sample())).backward()
    wrapper = DistributedDataParallel(tight.apply(make()))
    with pytest.warns(
        PlanWarning, match=f"{format_bytes(num_bytes)} of gradients lie in the buckets"
    ):
        square(wrapper(sample())).backward()
    wrapper.zero_grad()
    square(wrapper(sample())).backward()
