"""One of two tensor-parallel ranks holds what was predicted before there were any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner import estimate_mesh
from planner.base.budget import RequestedBudget
from planner.base.request import Request
from planner.base.solve_options import SolveOptions
from planner.base.step_spec import StepSpec
from planner.blocks.make_blocks import captured_in_blocks
from planner.mesh.pipeline import on_meta
from planner.mesh.tensor_parallel import divide, find_tp_plan
from tests.ranks import spawn_ranks

from .tiny_llama import IN_LAYERS, tiny_llama, tokens

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

RANKS = 2


def local(tensor: Tensor) -> Tensor:
    """The memory of a tensor on this rank."""
    for name in ("_local_tensor", "elem"):  # a DTensor's, an AsyncCollectiveTensor's
        tensor = getattr(tensor, name, tensor)
    return tensor


def memory_of(tensors: Any) -> dict[int, int]:
    """Bytes by address."""
    return {
        local(t).untyped_storage().data_ptr(): local(t).untyped_storage().nbytes() for t in tensors
    }


def one_rank(rank: int, folder: str) -> None:
    """Train one step of a LLaMA whose layers are divided; say what this rank held."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    model, sample = tiny_llama(), tokens()
    whole = model(**sample).loss.detach()
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    parallelize_module(
        model,
        init_device_mesh("cpu", (RANKS,)),
        {path: styles[style]() for path, style in IN_LAYERS.items()},
    )
    saved: list[Tensor] = []
    given: list[Tensor] = []
    layer = model.model.layers[1]
    forward = layer.forward

    def watched(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.extend(t for t in (hidden, *kwargs["position_embeddings"]))

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(hidden, *args, **kwargs)
        return output

    layer.forward = watched
    loss = model(**sample).loss
    loss.backward()
    outside = {**memory_of(given), **memory_of(model.parameters())}
    own = {at: size for at, size in memory_of(saved).items() if at not in outside}
    torch.save(
        {
            "loss": float(loss.detach()),
            "whole": float(whole),
            "parameters": sum(memory_of(model.parameters()).values()),
            "gradients": sum(memory_of(p.grad for p in model.parameters()).values()),
            "saved": sum(own.values()),
        },
        f"{folder}/{rank}",
    )
    dist.destroy_process_group()


def predicted_saved(model: nn.Module) -> int:
    """What one layer of a rank keeps from its forward to its backward, without its inputs."""
    rank = on_meta(model)
    divide(rank, find_tp_plan(rank, IN_LAYERS), RANKS)
    spec = StepSpec(model=rank, sample_input=tokens("meta"))
    request = Request.of(spec, SolveOptions(), budget=RequestedBudget(num_bytes=None, share=1.0))
    with captured_in_blocks(spec, request, "model.layers.*") as call:
        (block,) = call.captured.eager.blocks
    read_after = {k for op in block.graph.operators[block.turn + 1 :] for k in op.inputs}
    made_before = {k for op in block.graph.operators[: block.turn] for k in op.outputs}
    return sum(block.graph.storages[k].size_bytes for k in read_after & made_before)


def test_a_rank_holds_what_was_predicted(tmp_path: Path) -> None:
    """Two gloo ranks: parameters, as much of gradients, what a layer saves, to the byte."""
    spawn_ranks(one_rank, (str(tmp_path),), nprocs=RANKS)
    model = tiny_llama()
    found = estimate_mesh(model, tokens(), mesh={"tp": RANKS}, tp_plan=IN_LAYERS).stages[0]
    for rank in range(RANKS):
        held = torch.load(tmp_path / str(rank))
        assert held["loss"] == pytest.approx(held["whole"], rel=1e-5)
        assert held["parameters"] == found.unplanned.by_category["parameter"]
        assert held["gradients"] == found.unplanned.by_category["parameter"]
        assert held["saved"] == predicted_saved(model)
