"""The device that a step is captured for, which need not be present."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import CaptureError
from ..suggestions import did_you_mean
from .capability import known_capability
from .devices import DEVICES, Device, device_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a step will run.

    Parameters
    ----------
    device
        Its rates and sizes.
    torch_device
        Where stand-ins of the step's tensors lie while it is traced.
    at_hand
        Whether that device is present, so that calls can be run and timed on made-up
        values, wherever the model lies.
    elsewhere
        Whether the model now lies on another device.
    """

    device: Device
    torch_device: torch.device
    at_hand: bool
    elsewhere: bool = False

    @property
    def torch_type(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.torch_device.type

    @property
    def absent(self) -> bool:
        """Whether no device of its type is present, so that PyTorch's engine cannot be used."""
        return self.torch_type == "cuda" and not torch.cuda.is_available()

    @property
    def imitated(self) -> bool:
        """Whether PyTorch's choices on it must be known without asking PyTorch."""
        if self.torch_type != "cuda":
            return False
        if self.absent:
            return True
        known = known_capability(self.device)
        if known is None:
            return not self.at_hand
        return known != torch.cuda.get_device_capability()

    def place(self, device: torch.device) -> torch.device:
        """The device that a tensor now on ``device`` has in the step."""
        return self.torch_device if self.elsewhere or device.type == "meta" else device


def target_of(
    model: nn.Module, inputs: Iterable[torch.Tensor], device: str | Device | None = None
) -> Target:
    """Return where ``model`` will run.

    Parameters
    ----------
    model, inputs
        On the CPU, on one CUDA device, on ``meta``, or fake.
    device
        A name of :data:`DEVICES`; a :class:`Device` (one with the name of the device
        at hand stands for it); ``"cuda"`` for the card at hand; ``None`` for the
        device of the model, which is the CPU for ``meta``.

    Raises
    ------
    ValueError
        When the device is unknown.
    CaptureError
        When the model is spread over several devices.
    """
    lies_on = _lies_on([*model.parameters(), *inputs])
    if device is None:
        where = torch.device("cpu") if lies_on.type == "meta" else lies_on
        return Target(device=device_for(where.type), torch_device=where, at_hand=True)
    entry = _entry(device)
    here = _is_here(entry)
    if entry.torch_type == lies_on.type:
        return Target(device=entry, torch_device=lies_on, at_hand=here)
    where = torch.device("cuda:0" if entry.torch_type == "cuda" else entry.torch_type)
    return Target(device=entry, torch_device=where, at_hand=here, elsewhere=True)


def _is_here(entry: Device) -> bool:
    if entry.torch_type == "cuda" and not torch.cuda.is_available():
        return False
    return entry.name == device_for(entry.torch_type).name


def _entry(device: str | Device) -> Device:
    if isinstance(device, Device):
        return device
    if device == "cuda" and torch.cuda.is_available():
        return device_for("cuda")
    if device not in DEVICES:
        known = ", ".join(DEVICES)
        meant = did_you_mean(str(device).lower(), DEVICES)
        raise ValueError(f"unknown device {device!r}; {meant}known are {known}, or give a Device")
    return DEVICES[device]


def _lies_on(tensors: Iterable[torch.Tensor]) -> torch.device:
    """The one device of a step's tensors besides the CPU, where some inputs may stay."""
    devices = {t.device for t in tensors}
    devices -= {torch.device("cpu")} if len(devices) > 1 else set()
    if len(devices) > 1:
        devices -= {torch.device("meta")}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise CaptureError(f"the step is spread over several devices ({names}); plan one at a time")
    return devices.pop() if devices else torch.device("cpu")
