"""Take the device's memory as the budget where none is given."""

from __future__ import annotations

from graph_capture.costs.devices import Device
from graph_capture.target import Target

from ..base.budget import (
    Budget,
    parse_budget,
    parse_headroom,
)


def budget_or_device(
    target: Target,
    *,
    budget_gb: float | str | None = None,
    budget_bytes: int | str | None = None,
    headroom: float | str | None = None,
) -> Budget | None:
    """Return the given budget, else the device's memory; ``None`` where neither is known.

    Raises
    ------
    ValueError
        When the budget is given twice, or is no amount.
    """
    if budget_gb is None and budget_bytes is None:
        total_bytes = device_bytes(target.device)
        if total_bytes is None:
            return None
    else:
        total_bytes = parse_budget(budget_gb, budget_bytes)
    return parse_headroom(headroom, total_bytes, target.torch_type)


def device_bytes(device: Device) -> int | None:
    """Return a device's memory minus what its context takes; ``None`` if unknown."""
    if device.memory_bytes is None:
        return None
    return device.memory_bytes - (device.context_bytes or 0)
