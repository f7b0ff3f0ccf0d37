"""What ``fully_shard`` leaves on a module."""

from __future__ import annotations

from typing import Any

from torch import nn


def gathered_group_of(module: nn.Module) -> Any:
    """The parameters that ``fully_shard`` gathers for a module's calls, or ``None``; 2.11+.

    Read of it are ``mesh_info``, ``post_forward_mesh_info``, ``mp_policy``, ``reduce_grads`` and
    ``fsdp_params``.
    """
    if not vars(module).get("_is_fsdp_managed_module"):
        return None
    from torch.distributed.fsdp import FSDPModule  # a third of a second; most never need it

    return module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None


__all__ = ["gathered_group_of"]
