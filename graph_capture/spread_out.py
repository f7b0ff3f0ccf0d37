"""Models that several processes train together: what cannot be planned, what is this process's."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import NotFittingError


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

    for path, parameter in model.named_parameters():
        if not gathered and is_spread(parameter):
            raise NotFittingError(
                f"parameter {path!r} is a DTensor, as parallelize_module makes them for tensor "
                "parallelism: its operators run on this process's part and communicate, which no "
                "plan does yet. Shard the model with fully_shard instead, and plan inside its "
                "blocks: optimize(…, granularity='blocks', distributed='fsdp2:ranks=2')"
            )


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


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what of a tensor lies in this process: of a ``DTensor`` its own part."""
    if not is_spread(tensor):
        return tensor
    part: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def _is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` gathers all of a module at once."""
    if not vars(module).get("_is_fsdp_managed_module"):
        return False
    from torch.distributed.fsdp import FSDPModule  # a third of a second; most never need it

    return [m for m in module.modules() if isinstance(m, FSDPModule)] == [module]


def _has_shards(module: nn.Module) -> bool:
    return any(map(is_spread, module.parameters()))


__all__ = ["is_gathered", "is_sharded", "is_spread", "local_part", "refuse_spread_out"]
