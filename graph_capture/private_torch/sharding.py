"""What ``fully_shard`` leaves on a module, and what is inside a ``DTensor``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .dispatch import disable_current_modes
from .replacing import Place


def gathered_group_of(module: nn.Module) -> Any:
    """The parameters that ``fully_shard`` gathers for a module's calls, or ``None``; 2.11+.

    Read of it are ``mesh_info``, ``post_forward_mesh_info``, ``mp_policy``, ``reduce_grads``,
    ``offload_policy`` and ``fsdp_params``.
    """
    if not vars(module).get("_is_fsdp_managed_module"):
        return None
    from torch.distributed.fsdp import FSDPModule  # a third of a second; most never need it

    return module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None


def part_of(tensor: Any) -> torch.Tensor:
    """The part of a ``DTensor`` that lies in this process, without a record of autograd; 2.11+."""
    part: torch.Tensor = tensor._local_tensor
    return part


def division_of(tensor: Any) -> Any:
    """How a ``DTensor`` is divided: ``mesh``, ``placements`` and ``tensor_meta``; 2.11+."""
    return tensor._spec


def whole_of(part: torch.Tensor, division: Any, *, requires_grad: bool = False) -> torch.Tensor:
    """The ``DTensor`` of which a tensor is this process's part; 2.11+."""
    from torch.distributed.tensor import DTensor

    whole: torch.Tensor = DTensor(part, division, requires_grad=requires_grad)
    return whole


@contextmanager
def divisions_outside_of_modes() -> Iterator[None]:
    """While active, no mode hears how ``DTensor`` finds out the form of a result; 2.11+.

    It runs each operator on whole stand-ins, which are no part of what a process computes.
    """
    from torch.distributed.tensor import DTensor

    place = Place(DTensor._op_dispatcher.sharding_propagator, "_propagate_tensor_meta_non_cached")
    own = place.value

    def found(schema: Any) -> Any:
        with disable_current_modes():
            return own(schema)

    with place.holding(found):
        yield


def kept_waiting(tensor: torch.Tensor) -> torch.Tensor:
    """The result of a collective that may still be under way, once it has ended; 2.11+."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return tensor.trigger_wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def prefetches_of(module: Any) -> list[str]:
    """Return the methods by which a sharded module was told what to gather ahead of time; 2.11+."""
    if gathered_group_of(module) is None:
        return []
    state = module._get_fsdp_state()
    return [
        f"set_modules_to_{way}_prefetch"
        for way in ("forward", "backward")
        if getattr(state, f"_states_to_{way}_prefetch")
    ]


__all__ = [
    "divisions_outside_of_modes",
    "division_of",
    "gathered_group_of",
    "kept_waiting",
    "part_of",
    "prefetches_of",
    "whole_of",
]
