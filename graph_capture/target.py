"""The device that a step is captured for, which need not be the one at hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .costs.devices import DEVICES, Device, device_for
from .errors import CaptureError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a step shall run.

    Parameters
    ----------
    device
        Its rates and sizes.
    torch_device
        Where stand-ins of the step's tensors lie while it is traced.
    at_hand
        Whether the model lies there, so that calls can be run and timed.
    elsewhere
        Whether the model lies on another device now.
    """

    device: Device
    torch_device: torch.device
    at_hand: bool
    elsewhere: bool = False

    @property
    def torch_type(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.torch_device.type

    def place(self, device: torch.device) -> torch.device:
        """Where a tensor of the step lies that is now on ``device``."""
        return self.torch_device if self.elsewhere or device.type == "meta" else device


def target_of(
    model: nn.Module, inputs: Iterable[torch.Tensor], device: str | Device | None = None
) -> Target:
    """Where ``model`` shall run.

    Parameters
    ----------
    model, inputs
        On the CPU, on one CUDA device, on ``meta``, or fake.
    device
        A name of :data:`DEVICES`, a :class:`Device`, ``"cuda"`` for the card at
        hand; ``None`` for where the model lies, which for ``meta`` is the CPU.

    Raises
    ------
    ValueError
        When no such device is known.
    CaptureError
        When the model is spread over several devices.
    """
    parameters = list(model.parameters())
    lies_on = _lies_on([*parameters, *inputs])
    stand_in = any(t.is_meta or isinstance(t, FakeTensor) for t in parameters)
    if device is None:
        where = torch.device("cpu") if lies_on.type == "meta" else lies_on
        return Target(device=device_for(where.type), torch_device=where, at_hand=not stand_in)
    entry = _entry(device)
    if entry.torch_type == lies_on.type:
        here = entry is device_for(lies_on.type) and not stand_in
        return Target(device=entry, torch_device=lies_on, at_hand=here)
    where = torch.device("cuda:0" if entry.torch_type == "cuda" else entry.torch_type)
    return Target(device=entry, torch_device=where, at_hand=False, elsewhere=True)


def _entry(device: str | Device) -> Device:
    if isinstance(device, Device):
        return device
    if device == "cuda" and torch.cuda.is_available():
        return device_for("cuda")
    if device not in DEVICES:
        known = ", ".join(DEVICES)
        raise ValueError(f"unknown device {device!r}; known are {known}, or give a Device")
    return DEVICES[device]


def _lies_on(tensors: Iterable[torch.Tensor]) -> torch.device:
    """The one device of a step's tensors beside the CPU, where some inputs may stay."""
    devices = {t.device for t in tensors}
    devices -= {torch.device("cpu")} if len(devices) > 1 else set()
    if len(devices) > 1:
        devices -= {torch.device("meta")}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise CaptureError(f"the step is spread over several devices ({names}); plan one at a time")
    return devices.pop() if devices else torch.device("cpu")
