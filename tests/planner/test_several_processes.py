"""Models that several processes train: what is refused, and what is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.testing.bitwise import assert_same_tensors
from graph_capture.calls.spread_out import local_part
from graph_capture.units import format_bytes
from planner import (
    CaptureError,
    Plan,
    PlanError,
    PlanMismatchError,
    PlanWarning,
    applied_plan,
    measure,
    optimize,
    watch,
)
from planner.measuring.measure import record_peak
from planner.running.uncounted_buckets import output_bytes, uncounted_bytes
from planner.saving.serialize import plan_from_dict, plan_to_dict
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


def _divided(model: nn.Module, **row: Any) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel(**row)})


def test_a_tensor_parallel_model_has_a_plan_of_its_own():
    """The plan knows how parameters are divided: one of the whole model is not one of a rank's."""
    plan = optimize(_layers(), sample(), budget_gb=1, loss_fn=square)
    model = _divided(_layers())
    with pytest.raises(PlanMismatchError, match=r"a part of \[32, 32\] as Shard\(dim=0\)"):
        plan.apply(model)
    own = optimize(model, sample(), budget_gb=1, loss_fn=square)
    assert own.guard.state["0.weight"].division is not None
    own.apply(model)
    square(model(sample())).backward()
    assert applied_plan(model).planned_steps == 1


def test_gradients_of_a_tensor_parallel_model_that_nothing_consumes_are_a_warning():
    """Their bytes are those of this rank's parts."""
    model = _divided(_layers())
    optimize(model, sample(), budget_gb=1, loss_fn=square, grads="consumed").apply(model)
    held = format_bytes(sum(local_part(p).nbytes for p in model.parameters()))
    with pytest.warns(PlanWarning, match=f"{held} of gradients are there when the backward"):
        square(model(sample())).backward()


def test_a_model_that_returns_a_divided_tensor_is_refused_with_what_works():
    """A plan's gradients come from plain tensors."""
    model = _divided(_layers(), use_local_output=False)
    with pytest.raises(CaptureError, match=r"output .* is a DTensor .*use_local_output=True"):
        optimize(model, sample(), budget_gb=1, loss_fn=square)


def test_a_model_that_is_called_with_a_divided_tensor_is_refused_with_what_works():
    """So are its arguments."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    whole = distribute_tensor(sample(), mesh, [Replicate()])
    with pytest.raises(CaptureError, match=r"argument .* is a DTensor .*use_local_output=True"):
        optimize(_divided(_layers()), whole, budget_gb=1, loss_fn=square)


def test_a_divided_model_is_planned_where_it_trains():
    """Parts of an absent device's mesh are not known."""
    with pytest.raises(CaptureError, match=r"DTensors, and the plan is for .*estimate_mesh"):
        optimize(_divided(_layers()), sample(), budget_gb=1, loss_fn=square, device="h100")


def test_a_divided_model_has_no_word_for_sharding():
    """``fully_shard`` around parts is not counted."""
    model = nn.Sequential(_divided(_layers()))
    options = {"granularity": "blocks", "blocks": "0", "distributed": "fsdp2:ranks=2"}
    with pytest.raises(ValueError, match=r"'0\.0\.weight' is a DTensor.*leave distributed= out"):
        optimize(model, sample(), budget_gb=1, loss_fn=square, **options)


class _Branching(nn.Module):
    """A block, and a value that decides what is done with its result."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _divided(_layers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.block(x)
        return made if made.mean().item() * 2 < 1e9 else made * 2


def test_a_divided_model_is_not_run_for_real_while_planning():
    """Its collectives would wait for ranks that do not plan."""
    with pytest.raises(CaptureError, match=r"DTensors, whose collectives would wait for other"):
        optimize(
            make(_Branching),
            sample(),
            budget_gb=1,
            loss_fn=square,
            granularity="blocks",
            blocks="block",
        )


def test_a_wrapper_within_a_model_is_refused_with_what_works():
    """Its forward would no longer tell the others."""
    model = nn.Sequential(DistributedDataParallel(make()))
    with pytest.raises(CaptureError, match=r"optimize\(wrapper\.module"):
        optimize(model, sample(), budget_gb=1, loss_fn=square)


def test_of_a_wrapper_the_module_inside_is_planned_and_trained():
    """The wrapper's forward still tells the others, and its plan is found through it."""
    plain, wrapper = DistributedDataParallel(make()), DistributedDataParallel(make())
    plan = optimize(wrapper, sample(), budget_gb=1, loss_fn=square)
    assert plan.apply(wrapper) is wrapper
    found = []
    for model in (plain, wrapper):
        torch.manual_seed(0)
        square(model(sample())).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert_same_tensors(*found)
    assert applied_plan(wrapper).planned_steps == 1
    assert applied_plan(wrapper.module).planned_steps == 1
    Plan.remove(wrapper)
    assert applied_plan(wrapper) is None


DIVISOR_BYTES = 12
"""The reducer divides a gradient beside which eager may hold others; plans leave it out."""

OPTIONS = [
    {},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True},
]


def test_a_model_replicated_by_fsdp_is_refused_with_what_works():
    """Its parameters are DTensors, but no parts of tensor parallel ones."""
    replicated = pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    model = replicated.replicate(make(), mesh=mesh)
    with pytest.raises(CaptureError, match=r"replicate_with_fsdp.*DistributedDataParallel instead"):
        optimize(model, sample(), budget_gb=1, loss_fn=square)


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_wrapped_models_buckets_are_in_its_plan_exactly(options):
    """A category of their own, found from the wrapper's options."""
    wrapper = DistributedDataParallel(make(), **options)
    plan = optimize(wrapper, sample(), budget_gb=1, loss_fn=square)
    num_flags = 2 if plan.holds.copies_outputs else 0
    num_bytes = sum(p.numel() * p.element_size() + 4 * num_flags for p in wrapper.parameters())
    assert plan.memory.by_category["bucket"] == num_bytes
    eager = measure(wrapper, sample(), loss_fn=square, repeats=0)
    assert eager.peak_bytes - plan.baseline_peak_bytes in (0, DIVISOR_BYTES)
    found = measure(plan.apply(wrapper), sample(), loss_fn=square, repeats=0)
    assert found.peak_bytes == plan.predicted_peak_bytes


def test_a_plan_for_a_wrapper_says_so_and_is_validated_without_one():
    """The word is in the plan and its file; one process stands for the wrapper."""
    plan = optimize(
        make(),
        sample(),
        budget_gb=1,
        loss_fn=square,
        distributed="ddp:gradient_as_bucket_view,find_unused_parameters",
    )
    loaded = plan_from_dict(json.loads(json.dumps(plan_to_dict(plan))))
    assert loaded.holds == plan.holds
    assert "buckets of ddp:gradient_as_bucket_view,find_unused_parameters" in str(Plan.of(loaded))
    found = plan.validate(make(), sample(), repeats=0)
    assert found.peak.predicted == found.peak.measured
    assert found.bits == "equal"


def test_words_that_do_not_fit_are_refused():
    """Unknown options, other options than the wrapper's, and gradients that nothing frees."""
    asked = {"budget_gb": 1, "loss_fn": square}
    for word in ("ddq", "ddp:views", 1):
        with pytest.raises(ValueError, match="distributed is None, 'ddp', or 'ddp:' and some of"):
            optimize(make(), sample(), distributed=word, **asked)
    with pytest.raises(ValueError, match="fully_shard is 'fsdp2:ranks=2'"):
        optimize(make(), sample(), distributed="fsdp", **asked)
    wrapper = DistributedDataParallel(make())
    for word in ("ddp:static_graph", "fsdp2:ranks=2"):
        with pytest.raises(ValueError, match="the model is wrapped as 'ddp'"):
            optimize(wrapper, sample(), distributed=word, **asked)
    with pytest.raises(ValueError, match="hold every gradient to the end"):
        optimize(wrapper, sample(), grads="consumed", **asked)


def test_fully_shard_is_counted_in_blocks_only():
    """Any other plan, and a measurement, says what to do instead."""
    word = {"loss_fn": square, "distributed": "fsdp2:ranks=2"}
    with pytest.raises(ValueError, match="granularity='blocks'"):
        optimize(make(), sample(), budget_gb=1, **word)
    with pytest.raises(ValueError, match="measured as it is, by all ranks together"):
        measure(make(), sample(), **word)


def test_a_file_whose_buckets_do_not_fit_its_word_is_refused():
    """The message names both."""
    plan = optimize(make(), sample(), budget_gb=1, loss_fn=square, resident_bytes=8)
    written = json.loads(json.dumps(plan_to_dict(plan)))
    written["loop_holds"]["distributed"] = "ddp"
    with pytest.raises(PlanError, match=r"buckets and loop_holds\.distributed do not fit"):
        plan_from_dict(written)


def test_a_watched_model_finds_its_wrapper():
    """The first call comes through it."""
    model = make()
    wrapper = DistributedDataParallel(model, gradient_as_bucket_view=True)
    watched = watch(model, budget_gb=1, loss_fn=square)
    square(wrapper(sample())).backward()
    assert str(watched.plan.holds.distributed) == "ddp:gradient_as_bucket_view"


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


@pytest.mark.parametrize(
    ("words", "options", "sync", "sets"),
    [
        ({}, {}, True, 1),
        ({}, {"gradient_as_bucket_view": True}, True, 1),
        ({"grads": "accumulated"}, {}, True, 1),
        ({"grads": "accumulated"}, {"gradient_as_bucket_view": True}, True, 0),
        ({"grads": "accumulated"}, {"gradient_as_bucket_view": True}, False, 1),
        ({"distributed": "ddp"}, {}, True, 0),
        ({"distributed": "ddp"}, {"gradient_as_bucket_view": True}, True, 0),
        ({"distributed": "ddp:gradient_as_bucket_view"}, {}, True, 1),
        (
            {"distributed": "ddp:gradient_as_bucket_view"},
            {"gradient_as_bucket_view": True},
            False,
            1,
        ),
    ],
)
def test_what_of_a_wrapper_is_not_counted(words, options, sync, sets):
    """As many sets of gradients as a plan's words leave out."""
    plan = optimize(make(), sample(), budget_gb=1, loss_fn=square, **words)
    wrapper = DistributedDataParallel(make(), **options)
    num_bytes = sum(p.numel() * p.element_size() for p in wrapper.parameters())
    with nullcontext() if sync else wrapper.no_sync():
        found = uncounted_bytes(wrapper, plan.holds, plan.device_type, output_bytes(plan))
    assert found == sets * num_bytes


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
