"""What a model holds, and what its forward changes of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .call_spec import TensorSpec
from .errors import NotFittingError
from .recorder import storage_id


def numbers_of(model: nn.Module) -> dict[str, float]:
    """Plain numbers among the attributes of modules."""
    return {
        f"{path}.{key}" if path else key: value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def changed_numbers(before: Mapping[str, float], after: Mapping[str, float]) -> set[str]:
    return {name for name in before if name in after and before[name] != after[name]}


def refuse_counters(names: set[str]) -> None:
    """A number that is another one after each forward, which a planned step would not be."""
    if names:
        raise NotFittingError(
            f"forward counts in attribute {min(names)!r}, and a plan would repeat what it computed "
            "from one count for ever; keep it in a buffer, or count in the training loop"
        )


Registered = dict[str, tuple[str, torch.Tensor, int]]


def registered(model: nn.Module) -> Registered:
    """Role, tensor and storage of every parameter and buffer by name, in each of its places."""
    return {
        f"{path}.{key}" if path else key: (role, tensor, storage_id(tensor))
        for path, module in model.named_modules()
        for role, table in (("parameter", module._parameters), ("buffer", module._buffers))
        for key, tensor in table.items()
        if tensor is not None
    }


def reassigned_buffers(
    before: Registered, after: Registered
) -> list[tuple[str, torch.Tensor, bool]]:
    """Name and new value of the buffers that forward replaced, and whether the object stayed."""
    changed = set(before) ^ set(after)
    if changed:
        raise NotFittingError(
            f"forward registers or removes {min(changed)!r}; a plan needs a model that keeps its "
            "parameters and buffers. If only the first call does so, run the model once before"
        )
    found = []
    for name, (role, old, old_memory) in before.items():
        _, new, new_memory = after[name]
        if new is old and new_memory == old_memory:
            continue
        if role == "parameter":
            raise NotFittingError(f"forward replaces parameter {name!r}; change it in the loop")
        if new.requires_grad:
            raise NotFittingError(
                f"forward replaces buffer {name!r} by a tensor that requires grad, which would "
                "carry the graph of one step into the next; detach it"
            )
        if (new.shape, new.dtype, new.stride()) != (old.shape, old.dtype, old.stride()):
            raise NotFittingError(
                f"forward replaces buffer {name!r}, a {TensorSpec.of(old)}, by a "
                f"{TensorSpec.of(new)}; each step would need a plan of its own"
            )
        found.append((name, new, new is old))
    return found


def state_of(model: nn.Module) -> list[tuple[str, torch.Tensor, tuple[str, ...]]]:
    """Every parameter and buffer once, with all the names that it has."""
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for role, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            first.setdefault(id(tensor), (role, tensor))
            names.setdefault(id(tensor), []).append(name)
    return [(role, tensor, tuple(names[key])) for key, (role, tensor) in first.items()]
