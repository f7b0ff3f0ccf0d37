"""Models that several processes train together: what cannot be planned, what is this process's."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import NotFittingError
from ..private_torch.sharding import division_of, divisions_outside_of_modes, kept_waiting, part_of


def refuse_spread_out(model: nn.Module) -> None:
    """Refuse sharded parameters, and wrappers or tensors that communicate in forward.

    Raises
    ------
    NotFittingError
        Names the module and what can be planned instead.
    """
    gathered = is_gathered(model)
    for path, module in model.named_modules():
        name = f"module {path!r}" if path else f"this {type(module).__name__}"
        if isinstance(module, DistributedDataParallel):
            raise NotFittingError(
                f"{name} is a DistributedDataParallel, whose forward tells other processes of the "
                "step, and a plan would leave that out. Plan the module inside, and train through "
                "the wrapper as before: optimize(wrapper.module, …).apply(wrapper.module)"
            )
        if _is_replicated(module):
            raise NotFittingError(
                f"{name} is replicated by replicate_with_fsdp: its parameters are DTensors that "
                "are exchanged for others while a step runs, and a plan is made for those that "
                "stay. Wrap the model in DistributedDataParallel instead, and plan the wrapper: "
                "optimize(wrapper, …).apply(wrapper)"
            )
        # Set by FullyShardedDataParallel and by fully_shard, for torch.compile.
        if vars(module).get("_is_fsdp_managed_module") and not gathered:
            raise NotFittingError(
                f"{name} is sharded by FSDP (fully_shard or FullyShardedDataParallel): its "
                "parameters are gathered and freed again while a step runs, and a plan is made "
                "for parameters that are there. To train by a plan, wrap the planned module in "
                "DistributedDataParallel instead, or plan inside its blocks before they are "
                "sharded by fully_shard: optimize(…, granularity='blocks', "
                "distributed='fsdp2:ranks=2')"
            )

    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not gathered and is_spread(tensor):
            _refuse_uneven(path, tensor)


def _refuse_uneven(path: str, tensor: torch.Tensor) -> None:
    """Refuse a ``DTensor`` of which ranks have parts of different sizes."""
    division = division_of(tensor)
    ranks = [1] * tensor.dim()
    for placement, size in zip(division.placements, division.mesh.shape, strict=True):
        if placement.is_shard():
            ranks[placement.dim] *= size
    for dim, (size, parts) in enumerate(zip(tensor.shape, ranks, strict=True)):
        if size % parts:
            raise NotFittingError(
                f"{path!r} is a DTensor whose dimension {dim} of {size} elements is divided among "
                f"{parts} ranks unevenly, so that each rank would need another plan: choose sizes "
                "that the number of ranks divides, or leave this module out of parallelize_module"
            )


def refuse_divided(tensors: Iterable[torch.Tensor], names: Iterable[str], what: str) -> None:
    """Refuse a call that takes or returns a ``DTensor``: plans are for plain tensors.

    Raises
    ------
    NotFittingError
        Names the first one, and what to do.
    """
    for tensor, name in zip(tensors, names, strict=False):
        words = division_in_words(tensor)
        if words is not None:
            raise NotFittingError(f"{what} {name!r} is a DTensor ({words}); {LOCAL}")


LOCAL = (
    "only plain tensors can come into a planned module and out of it: let the styles of "
    "parallelize_module hand on each rank's part (use_local_output=True, which is the default of "
    "most), or plan the modules around it or inside it as blocks"
)
"""What to do where a module is called with a ``DTensor``, or returns one."""


def is_gathered(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has gathered a module's parameters, as it does for its calls."""
    return _is_unit(module) and not _has_shards(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are spread out by ``fully_shard``, and gathered for calls."""
    return _is_unit(module) and _has_shards(module)


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")  # where it is not loaded, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def divisions_apart() -> AbstractContextManager[None]:
    """While active, what ``DTensor`` computes to find out forms is no part of a step."""
    loaded = "torch.distributed.tensor" in sys.modules
    return divisions_outside_of_modes() if loaded else nullcontext()


def are_spread(types: Iterable[type]) -> bool:
    """Whether one of the types of a call's arguments is ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(t, module.DTensor) for t in types)


def division_in_words(tensor: torch.Tensor) -> str | None:
    """Say how a ``DTensor`` is divided, the same on all ranks; ``None`` for other tensors."""
    if not is_spread(tensor):
        return None
    division = division_of(tensor)
    placements = ", ".join(map(repr, division.placements))
    return f"{list(tensor.shape)} as {placements} over {list(division.mesh.shape)} ranks"


def mesh_of(tensor: torch.Tensor) -> Any:
    """Return the ranks among which a ``DTensor`` is divided; ``None`` for other tensors."""
    return division_of(tensor).mesh if is_spread(tensor) else None


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what of a tensor lies in this process: of a ``DTensor`` its own part.

    A collective that may still be under way is waited for.
    """
    if type(tensor) in _PLAIN:
        return tensor
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is None:
        return tensor
    return kept_waiting(part_of(tensor) if is_spread(tensor) else tensor)


_PLAIN = (torch.Tensor, nn.Parameter)


def _is_replicated(module: nn.Module) -> bool:
    """Whether FSDP2 gathers a module without having divided it."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    its_own = loaded is not None and isinstance(module, loaded.FSDPModule)
    return its_own and not vars(module).get("_is_fsdp_managed_module")


def _is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` gathers all of a module at once."""
    if not vars(module).get("_is_fsdp_managed_module"):
        return False
    from torch.distributed.fsdp import FSDPModule  # a third of a second; most never need it

    return [m for m in module.modules() if isinstance(m, FSDPModule)] == [module]


def _has_shards(module: nn.Module) -> bool:
    return any(map(is_spread, module.parameters()))


__all__ = [
    "LOCAL",
    "are_spread",
    "division_in_words",
    "divisions_apart",
    "is_gathered",
    "is_sharded",
    "is_spread",
    "local_part",
    "mesh_of",
    "refuse_divided",
    "refuse_spread_out",
]
