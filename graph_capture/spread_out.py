"""Refuse what cannot be planned in models that several processes train together."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import NotFittingError


def refuse_spread_out(model: nn.Module) -> None:
    """Refuse sharded parameters, and wrappers that communicate in forward.

    Raises
    ------
    NotFittingError
        Names the module and what can be planned instead.
    """
    for path, module in model.named_modules():
        name = f"module {path!r}" if path else f"this {type(module).__name__}"
        if isinstance(module, DistributedDataParallel):
            raise NotFittingError(
                f"{name} is a DistributedDataParallel, whose forward tells other processes of the "
                "step, and a plan would leave that out. Plan the module inside, and train through "
                "the wrapper as before: optimize(wrapper.module, …).apply(wrapper.module)"
            )
        # Set by FullyShardedDataParallel and by fully_shard, for torch.compile.
        if vars(module).get("_is_fsdp_managed_module"):
            raise NotFittingError(
                f"{name} is sharded by FSDP (fully_shard or FullyShardedDataParallel): its "
                "parameters are gathered and freed again while a step runs, and a plan is made "
                "for parameters that are there. To train by a plan, wrap the planned module in "
                "DistributedDataParallel instead, or leave it whole; under FSDP recompute with "
                "torch.utils.checkpoint, without a plan"
            )


__all__ = ["refuse_spread_out"]
