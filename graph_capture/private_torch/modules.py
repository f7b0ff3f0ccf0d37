"""The tables of ``nn.Module``, and what wrappers of modules leave behind."""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _foreach_supported_types

# 2.11+; by name; the table itself, which registering writes to
parameters_of = attrgetter("_parameters")
# 2.11+; likewise
buffers_of = attrgetter("_buffers")
# 2.11+; likewise
children_of = attrgetter("_modules")
# 2.11+; classes whose parameters optimizers update many at once; a list that can be added to
FOREACH_TYPES: list[Any] = _foreach_supported_types
# 2.11+; what torch.compile puts before the names of a module's parameters
COMPILED_PREFIX = "_orig_mod."


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether hooks of its own run in backward; 2.11+."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def compiled_from(model: Any) -> Any:
    """The module that ``torch.compile`` made this one of, or ``None``; 2.11+."""
    return getattr(model, "_orig_mod", None)


def active_data_parallel() -> Any:
    """The ``DistributedDataParallel`` whose forward runs, or ``None``; 2.11+."""
    return DistributedDataParallel._active_ddp_module


def replicated_by(module: Any) -> tuple[Any, dict[str, Any]] | None:
    """What ``torch.distributed._composable.replicate`` has put around a module, if anything; 2.11+.

    The ``DistributedDataParallel``, or ``None`` before the first call, which makes it, and what it
    will be made with.
    """
    composable = sys.modules.get("torch.distributed._composable.replicate")
    if composable is None or not isinstance(module, composable.DDP):
        return None
    state = composable.replicate.state(module)
    return (state._ddp, {}) if state.has_initialized else (None, state._init_kwargs)


# 2.11+; the parameters whose gradients a DistributedDataParallel has in its buckets
bucketed_parameters_of = attrgetter("_module_parameters")

__all__ = [
    "COMPILED_PREFIX",
    "FOREACH_TYPES",
    "active_data_parallel",
    "bucketed_parameters_of",
    "buffers_of",
    "children_of",
    "compiled_from",
    "has_backward_hooks",
    "parameters_of",
    "replicated_by",
]
