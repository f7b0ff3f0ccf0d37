"""Take the device's memory as the budget if none is given."""

from __future__ import annotations

from graph_capture.costs.devices import Device
from graph_capture.costs.target import Target

from ..base.budget import RequestedBudget, read_budget


def budget_or_device(
    target: Target,
    *,
    budget: str | None = None,
    budget_gb: float | str | None = None,
    budget_bytes: int | str | None = None,
) -> RequestedBudget | None:
    """Return the given budget, else the device's memory; ``None`` if neither is known.

    Raises
    ------
    ValueError
        When the budget is given twice, or is not an amount of memory.
    """
    if budget is None and budget_gb is None and budget_bytes is None:
        num_bytes = device_bytes(target.device)
        return None if num_bytes is None else RequestedBudget(num_bytes=num_bytes)
    return read_budget(budget, budget_gb, budget_bytes)


def device_bytes(device: Device) -> int | None:
    """Return a device's memory minus that of its context; ``None`` if unknown."""
    if device.memory_bytes is None:
        return None
    return device.memory_bytes - (device.context_bytes or 0)
