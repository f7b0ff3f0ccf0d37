"""How much memory the tensors of a call keep alive.

A tensor that is a slice of a larger one keeps all of that in memory, and two tensors in
one memory keep it once. Eager's peak counts it so, and a plan's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .call_spec import TensorSpec, tensors_of
from .storage_id import storage_id


def argument_bytes(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the bytes that each tensor of a call adds to those before it.

    The first that lies in a memory has all of it, whatever part it is; the others there,
    and those that lie in the model's own, have none.

    Parameters
    ----------
    arguments
        As from ``call_spec.bind_call``.

    Returns
    -------
    tuple of int, or None
        In the order of ``call_spec.tensors_of``. ``None`` where every tensor has the memory
        from its first to its last element, as made from specifications.
    """
    tensors = tensors_of(arguments)
    state = [*model.parameters(), *model.buffers()] if tensors else []
    if any(t.layout != torch.strided for t in (*tensors, *state)):
        return None  # is refused elsewhere
    seen = set(map(storage_id, state))
    found = []
    for tensor in tensors:
        memory = storage_id(tensor)
        found.append(0 if memory in seen else tensor.untyped_storage().nbytes())
        seen.add(memory)
    alone = [TensorSpec.of(tensor).extent_bytes for tensor in tensors]
    return None if found == alone else tuple(found)


def enlarged_bytes(
    model: nn.Module, sample: Mapping[str, Any], larger: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """Return :func:`argument_bytes` of a call that was enlarged from a sample.

    What the sample's tensors are slices of is taken to be there for the larger ones, too.
    """
    tensors, enlarged = tensors_of(sample), tensors_of(larger)
    if all(a is b for a, b in zip(tensors, enlarged, strict=True)):
        return argument_bytes(model, sample)
    held = argument_bytes(model, sample)
    if held is None:
        return argument_bytes(model, larger)
    return tuple(
        num_bytes if a is b else max(num_bytes, TensorSpec.of(b).extent_bytes)
        for num_bytes, a, b in zip(held, tensors, enlarged, strict=True)
    )


def beside_slices(
    planned: tuple[int, ...] | None,
    planned_alone: Sequence[int],
    held: tuple[int, ...] | None,
    alone: Sequence[int],
) -> tuple[int, ...] | None:
    """Return what a call keeps alive, beside what a planned call was a slice of.

    A loop may copy its batches out of the tensor that the first one was a slice of. That
    stays in memory; whether a call's own memory is that tensor shows in no size, so it
    counts unless the call is a slice of as much.

    Parameters
    ----------
    planned, held
        :func:`argument_bytes` of the planned call and of this one.
    planned_alone, alone
        Bytes from the first to the last element of each tensor.
    """
    if planned is None or not alone:
        return held
    sliced = sum(there for there, own in zip(planned, planned_alone, strict=True) if there > own)
    own_bytes = tuple(alone) if held is None else held
    is_slice = any(there > own for there, own in zip(own_bytes, alone, strict=True))
    if not sliced or (is_slice and sum(own_bytes) >= sliced):
        return held
    return (own_bytes[0] + sliced, *own_bytes[1:])


__all__ = ["argument_bytes", "beside_slices", "enlarged_bytes"]
