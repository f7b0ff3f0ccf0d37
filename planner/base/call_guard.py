"""Record the call and the module state that a plan is for, and say how another one differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graph_capture.calls.call_spec import (
    TensorSpec,
    describe,
    difference,
    moved,
    specs_of,
    tensors_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallGuard:
    """What must stay the same for a plan to be valid.

    Parameters
    ----------
    arguments
        The call by argument name, tensors as ``TensorSpec``.
    autocast
        Autocast's dtype on the device, as a name, or ``None`` when it is off.
    evaluating
        Paths of the modules in eval mode.
    state
        Parameters and buffers by name.
    argument_bytes
        What the call's tensors keep alive, see
        :func:`graph_capture.calls.argument_memory.argument_bytes`. Another call may keep more.
    """

    arguments: Mapping[str, Any]
    autocast: str | None
    evaluating: tuple[str, ...]
    state: Mapping[str, TensorSpec]
    argument_bytes: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        arguments: Mapping[str, Any],
        device_type: str,
        place: Callable[[torch.device], torch.device] = lambda device: device,
        argument_bytes: tuple[int, ...] | None = None,
    ) -> CallGuard:
        """Describe a call; tensors count as being on the device that ``place`` gives."""
        return cls(
            arguments=moved(describe(arguments), place),
            autocast=autocast_dtype(device_type),
            evaluating=tuple(name for name, m in model.named_modules() if not m.training),
            state={
                name: moved(TensorSpec.of(tensor), place)
                for named in (
                    model.named_parameters(remove_duplicate=False),
                    model.named_buffers(remove_duplicate=False),
                )
                for name, tensor in named
            },
            argument_bytes=argument_bytes,
        )

    @property
    def held_by_call(self) -> int:
        """Bytes that the call's tensors keep alive, wherever they lie."""
        if self.argument_bytes is not None:
            return sum(self.argument_bytes)
        return sum(spec.extent_bytes for spec in specs_of(self.arguments))

    def difference_to(self, other: CallGuard) -> str | None:
        """Describe the first difference to another call."""
        if self.autocast != other.autocast:
            return f"autocast is {other.autocast or 'off'}, planned was {self.autocast or 'off'}"
        if self.evaluating != other.evaluating:
            changed = sorted(set(self.evaluating) ^ set(other.evaluating))[0]
            mode = "train" if changed in self.evaluating else "eval"
            return f"module {changed!r} is in {mode} mode, which it was not when planned"
        return difference(self.state, other.state, "state") or difference(
            self.arguments, other.arguments
        )


def autocast_dtype(device_type: str) -> str | None:
    """Return the name of autocast's dtype on a device type; ``None`` when it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")


def lazy_input(arguments: Mapping[str, Any]) -> str | None:
    """Return the name of a tensor with a pending conjugation or negation.

    Kernels handle these themselves, each in its own way; a plan holds the calls for
    plain tensors.
    """
    for tensor in tensors_of(arguments):
        if tensor.is_conj() or tensor.is_neg():
            what = "conj" if tensor.is_conj() else "neg"
            return (
                f"an input, {TensorSpec.of(tensor)}, is a lazy {what} of another tensor, which a "
                f"plan is not made for; pass tensor.resolve_{what}()"
            )
    return None
