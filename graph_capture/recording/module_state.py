"""The state of a model, and what its forward changes in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..calls.call_spec import TensorSpec
from ..calls.storage_id import storage_id
from ..errors import NotFittingError
from ..private_torch.modules import buffers_of, parameters_of

Registered = dict[str, tuple[str, torch.Tensor, int]]


def registered(model: nn.Module) -> Registered:
    """Return role, tensor and storage of every parameter and buffer, by each of its names."""
    return {
        f"{path}.{key}" if path else key: (role, tensor, storage_id(tensor))
        for path, module in model.named_modules()
        for role, table in (("parameter", parameters_of(module)), ("buffer", buffers_of(module)))
        for key, tensor in table.items()
        if tensor is not None
    }


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model some of whose parameters or buffers have no shape yet.

    Raises
    ------
    NotFittingError
        Names the first one.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise NotFittingError(
                f"{name!r} has no shape yet (a lazy module): run the model once before planning"
            )


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
                f"{TensorSpec.of(new)}; each step would need another plan. If "
                "only the first call does so, run the model once before"
            )
        found.append((name, new, new is old))
    return found


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A stand-in of a step's input, with its layout before forward ran.

    Parameters
    ----------
    tensor
        The stand-in.
    name
        The input in words.
    spec, offset
        Its specification and its offset in its memory, before forward ran.
    """

    tensor: torch.Tensor
    name: str
    spec: TensorSpec
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str) -> LaidOut:
        """Record its current layout."""
        return cls(tensor, name, TensorSpec.of(tensor), int(tensor.storage_offset()))

    @property
    def is_so_still(self) -> bool:
        """Whether its layout is unchanged; ``requires_grad_()`` does not change it."""
        now, then = LaidOut.of(self.tensor, self.name), self
        return (now.spec.shape, now.spec.stride, now.offset) == (
            then.spec.shape,
            then.spec.stride,
            then.offset,
        )


def refuse_laid_out_anew(state: Iterable[LaidOut]) -> None:
    """Refuse steps that change an input's shape in place (``resize_``, ``squeeze_``).

    Raises
    ------
    NotFittingError
        A planned step would leave the shape as it was.
    """
    for held in state:
        if not held.is_so_still:
            raise NotFittingError(
                f"forward gives {held.name}, a {held.spec}, another shape or layout in place "
                f"(now {TensorSpec.of(held.tensor)}), which a planned step would not do. If only "
                "the first call does so, run the model once before; else work on a view or a copy"
            )


def state_of(model: nn.Module) -> list[tuple[str, torch.Tensor, tuple[str, ...]]]:
    """Return every parameter and buffer once, with all its names."""
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


def loose_tensors(model: nn.Module) -> list[tuple[torch.Tensor, tuple[str, ...]]]:
    """Return tensors in plain attributes of modules, each once with all its names.

    Left out are parameters and buffers that also lie there, and tensors that no plan
    takes as an input: those that require grad, subclasses, and sparse ones.
    """
    registered_ids = {id(tensor) for _, tensor, _ in state_of(model)}
    names: dict[int, list[str]] = {}
    found: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if type(value) not in (torch.Tensor, nn.Parameter) or id(value) in registered_ids:
                continue
            if value.requires_grad or value.layout != torch.strided or value.is_quantized:
                continue
            found[id(value)] = value
            names.setdefault(id(value), []).append(f"{path}.{key}" if path else key)
    return [(tensor, tuple(names[key])) for key, tensor in found.items()]
