"""The tensors that exist before a step begins, and their bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn

from graph_capture.calls.spread_out import local_part
from graph_capture.private_torch.tensors import is_zero_tensor

from .forward_slot import StandIn
from .training_step import (
    LossFn,
    Sample,
    output_tensors,
)
from .unwrap import find_wrapped

_CUDA_BLOCK_BYTES = 512


def resident_tensors(
    model: nn.Module,
    sample_input: Sample,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Tensor]:
    """Return every tensor that exists before a step begins, aliases included.

    Parameters, buffers, other tensors that are attributes of a module, the
    inputs, the optimizer's state, and what ``loss_fn`` carries with it (a
    module's own tensors, a closure's or a partial's). Of a planned module also
    tensors that lie elsewhere, in a global or a cache, and that its plan knows of.
    Gradients are not: a step begins with none.
    """
    tensors = [*_module_tensors(model), *output_tensors(sample_input)]
    if loss_fn is not None:
        tensors += _carried_tensors(loss_fn)
    if optimizer is not None:
        tensors += [t for state in optimizer.state.values() for t in output_tensors(state)]
    return tensors


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Return the gradients that parameters have now."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def resident_bytes_by_category(
    model: nn.Module,
    sample_input: Sample,
    device: torch.device,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, int]:
    """Return the bytes held before a step begins, by the cost graph's categories.

    A storage counts once, in the first category of these: parameter, buffer (a
    module's plain tensors, too), input (what ``loss_fn`` carries, too), optimizer
    state. The sum is that of :func:`resident_tensors`.
    """
    states = {} if optimizer is None else optimizer.state
    parts: dict[str, list[Tensor]] = {
        "parameter": list(model.parameters()),
        "buffer": _module_tensors(model),
        "input": [*output_tensors(sample_input)]
        + ([] if loss_fn is None else _carried_tensors(loss_fn)),
        "optimizer_state": [t for state in states.values() for t in output_tensors(state)],
    }
    found: dict[str, int] = {}
    before: list[Tensor] = []
    for category, tensors in parts.items():
        together = [*before, *tensors]
        found[category] = storage_bytes(together, device) - storage_bytes(before, device)
        before = together
    return found


def storage_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes of the distinct storages of the tensors on the device."""
    sizes: dict[int, int] = {}
    for t in map(local_part, tensors):
        # A tensor that is known to be zero, as some gradients are, has no memory.
        if t.device == device and t.layout == torch.strided and not is_zero_tensor(t):
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
    if device.type == "cuda":
        return sum(-(-size // _CUDA_BLOCK_BYTES) * _CUDA_BLOCK_BYTES for size in sizes.values())
    return sum(sizes.values())


def single_device(model: nn.Module, sample_input: Sample) -> torch.device:
    """Return the one device of a model's parameters, or of its inputs if it has none.

    Raises
    ------
    ValueError
        When there is not exactly one device, or it is neither a CPU nor a CUDA device.
    """
    tensors: list[Tensor] = [*model.parameters()] or [*output_tensors(sample_input)]
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"a step is measured on one device; the model lies on: {names}")
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"a real step cannot be measured on device {str(device)!r}")
    return device


def _module_tensors(module: nn.Module) -> list[Tensor]:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        tensors += [value for value in vars(part).values() if isinstance(value, Tensor)]
        planned = find_wrapped(vars(part).get("forward"), StandIn)
        if planned is not None:
            tensors += planned.constants
    return tensors


def _carried_tensors(function: Callable[..., Any]) -> list[Tensor]:
    if isinstance(function, nn.Module):
        return _module_tensors(function)
    if isinstance(function, functools.partial):
        return [
            *output_tensors((function.args, function.keywords)),
            *_carried_tensors(function.func),
        ]
    cells = getattr(function, "__closure__", None) or ()
    return [t for cell in cells for t in output_tensors(_contents(cell))]


def _contents(cell: CellType) -> Any:
    """Return the contents of a closure's cell; ``None`` while its variable has no value."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
