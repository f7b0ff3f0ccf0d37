"""The memory budget: as users write it, the part a plan may use, and the error when nothing fits.

Headroom
--------
A plan's predicted peak stays below the budget minus the headroom. The headroom covers what a
prediction cannot know: how the caching allocator divides its memory (reserved minus allocated), and
the prediction's own error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from graph_capture.cost_graph import MAX_TOTAL, CostGraph
from graph_capture.costs.devices import Device
from graph_capture.units import format_bytes, parse_bytes
from solvers.least_memory import LeastMemory
from solvers.replay import replay

from ..errors import InfeasibleBudgetError

# Part of the budget that is left free unless the user says otherwise, by torch's device type.
# CPU: predictions of planned steps are exact there, and the allocator holds nothing back.
# CUDA: an assumption about fragmentation and the prediction's error, not backed by a measurement.
DEFAULT_HEADROOM: Mapping[str, float] = {"cpu": 0.0, "cuda": 0.03}

_PERCENT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*%\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedBudget:
    """A budget as it was asked for.

    Parameters
    ----------
    num_bytes
        ``None`` for a share of a peak that is not known yet.
    share
        The share of the peak of the step without a plan, above 0 and at most 1; ``None``
        where bytes were asked for.
    """

    num_bytes: int | None
    share: float | None = None

    def settled(self, unplanned_peak_bytes: int) -> RequestedBudget:
        """Return the same budget in bytes, rounded down.

        >>> RequestedBudget(num_bytes=None, share=0.6).settled(1001).num_bytes
        600
        """
        if self.share is None:
            return self
        num_bytes = math.floor(self.share * unplanned_peak_bytes)
        if num_bytes < 1:
            raise ValueError(
                f"{share_text(self.share)} of the {format_bytes(unplanned_peak_bytes)} that the "
                "step takes without a plan is no memory at all"
            )
        return replace(self, num_bytes=num_bytes)


def read_percentage(text: object) -> float | None:
    """Return what a text such as ``"60%"`` says, as a fraction; ``None`` if it is none.

    >>> read_percentage("12.5 %"), read_percentage("40GB")
    (0.125, None)
    """
    percent = _PERCENT.fullmatch(text) if isinstance(text, str) else None
    return None if percent is None else float(percent[1]) / 100


def share_text(share: float) -> str:
    """Write a share as a percentage.

    >>> share_text(0.625)
    '62.5%'
    """
    return f"{100 * share:.6g}%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A budget, and the part of it that stays free.

    Parameters
    ----------
    total_bytes
        The requested budget.
    headroom_bytes
        Part of it that a plan leaves free.
    fraction
        The headroom as a fraction of the total; ``None`` when it was given in bytes.
    """

    total_bytes: int
    headroom_bytes: int
    fraction: float | None = None

    @property
    def usable_bytes(self) -> int:
        """The highest peak allowed for a plan."""
        return self.total_bytes - self.headroom_bytes

    def total_for(self, peak_bytes: int) -> int:
        """Return the least budget that leaves ``peak_bytes`` after the same headroom.

        >>> Budget(total_bytes=100, headroom_bytes=3, fraction=0.03).total_for(970)
        999
        """
        if self.fraction is None:
            return peak_bytes + self.headroom_bytes
        total = int(peak_bytes / (1 - self.fraction))
        # What is left grows with the total, by 0 or 1 per byte; the quotient is off by rounding.
        low, high = peak_bytes, total + 2
        while high - int(self.fraction * high) < peak_bytes:
            high *= 2
        while low < high:
            middle = (low + high) // 2
            if middle - int(self.fraction * middle) >= peak_bytes:
                high = middle
            else:
                low = middle + 1
        return low


def parse_budget(budget_gb: float | str | None, budget_bytes: int | str | None) -> int:
    """Return the budget in bytes; exactly one of the two must be given.

    >>> parse_budget("1GiB", None)
    1073741824

    Raises
    ------
    ValueError
        When neither or both are given, or the amount is not positive.
    """
    if (budget_gb is None) == (budget_bytes is None):
        raise ValueError("give the budget once: budget_gb=40, budget_gb='40GiB' or budget_bytes=…")
    if isinstance(budget_bytes, float) and math.isfinite(budget_bytes) and budget_bytes % 1:
        raise ValueError(
            f"budget_bytes={budget_bytes!r} is not a whole number of bytes: write "
            "budget_bytes=12_000_000_000, or budget_gb=12 for gigabytes"
        )
    try:
        if budget_gb is not None:
            budget = parse_bytes(budget_gb, default_unit="gb")
        else:
            assert budget_bytes is not None
            budget = parse_bytes(budget_bytes, default_unit="b")
        if budget > MAX_TOTAL:
            raise ValueError(f"a budget has at most {MAX_TOTAL} bytes")
        return budget
    except ValueError as error:
        asked = "budget_bytes" if budget_gb is None else "budget_gb"
        value = budget_bytes if budget_gb is None else budget_gb
        example = "12_000_000_000" if budget_gb is None else "40, '40GB' or '40GiB'"
        raise ValueError(f"{asked}={value!r}: {error}; write {asked}={example}") from error


def read_budget(
    budget: str | None, budget_gb: float | str | None, budget_bytes: int | str | None
) -> RequestedBudget:
    """Return the budget in whichever way it was given; exactly one of the three must be.

    Parameters
    ----------
    budget
        A share such as ``"60%"``, or an amount such as ``"40GB"``.
    budget_gb, budget_bytes
        As for :func:`parse_budget`.

    Raises
    ------
    ValueError
        When it is not given once, or is neither a share nor an amount.

    Examples
    --------
    >>> read_budget("60%", None, None).share
    0.6
    """
    if sum(way is not None for way in (budget, budget_gb, budget_bytes)) != 1:
        raise ValueError(
            "give the budget once: budget='60%', budget_gb=40, budget_gb='40GiB' or budget_bytes=…"
        )
    for asked in (budget, budget_gb, budget_bytes):
        share = read_percentage(asked)
        if share is not None:
            if not 0 < share <= 1:
                raise ValueError(
                    "a share of the peak of the step without a plan is above 0% and at most 100%, "
                    f"got {asked!r}"
                )
            return RequestedBudget(num_bytes=None, share=share)
    if budget is None:
        return RequestedBudget(num_bytes=parse_budget(budget_gb, budget_bytes))
    try:
        if not isinstance(budget, str):
            raise ValueError("a number says neither a share nor a unit")
        if budget.strip().replace(".", "", 1).isdigit():
            raise ValueError("a number says neither a share nor a unit")
        num_bytes = parse_bytes(budget, default_unit="gb")
        if num_bytes > MAX_TOTAL:
            raise ValueError(f"a budget has at most {MAX_TOTAL} bytes")
    except ValueError as error:
        raise ValueError(f"budget={budget!r}: {error}; write budget='60%' or '40GB'") from error
    return RequestedBudget(num_bytes=num_bytes)


def parse_headroom(headroom: float | str | None, budget_bytes: int, device_type: str) -> Budget:
    """Return the budget with its headroom.

    Parameters
    ----------
    headroom
        A fraction of the budget below one, a whole number of bytes from 100 on, a
        string such as ``"5%"`` or ``"2GB"``, or ``None`` for :data:`DEFAULT_HEADROOM`.
        Numbers from 1 to below 100 are refused, because they look like percentages. So
        are strings without ``%`` or a unit (``"0.05"``, ``"5"``), which might be a
        fraction, a percentage or bytes.
    budget_bytes
        The whole budget.
    device_type
        ``"cpu"`` or ``"cuda"``.

    Raises
    ------
    ValueError
        When it is not such an amount, or leaves nothing of the budget.

    Examples
    --------
    >>> parse_headroom("5%", 40_000_000_000, "cuda").usable_bytes
    38000000000
    """
    amount = DEFAULT_HEADROOM.get(device_type, 0.0) if headroom is None else _amount(headroom)
    fraction = amount if isinstance(amount, float) else None
    num_bytes = int(amount * budget_bytes) if isinstance(amount, float) else amount
    if num_bytes >= budget_bytes:
        raise ValueError(
            f"headroom={headroom!r} leaves nothing of a budget of {format_bytes(budget_bytes)}; "
            "give less headroom or a larger budget"
        )
    return Budget(total_bytes=budget_bytes, headroom_bytes=num_bytes, fraction=fraction)


def _amount(headroom: float | str) -> float | int:
    """Return a fraction as a float, or bytes as an integer."""
    if isinstance(headroom, str):
        share = read_percentage(headroom)
        if share is None and headroom.strip()[-1:].isalpha():
            try:
                return parse_bytes(headroom)
            except ValueError as error:
                raise ValueError(
                    "headroom is a fraction of the budget or an amount of bytes, got "
                    f"{headroom!r} ({error}): write '5%', 0.05 or '2GB'"
                ) from error
        if share is None:
            raise ValueError(
                "headroom is a fraction of the budget or an amount of bytes, and "
                f"{headroom!r} does not say which: write '5%', '2GB' or a number such as 0.05"
            )
        if share < 1:
            return share
    elif isinstance(headroom, (int, float)) and not isinstance(headroom, bool):
        if 0 <= headroom < 1:
            return float(headroom)
        if math.isfinite(headroom) and headroom >= 100 and headroom == int(headroom):
            return int(headroom)
    raise ValueError(
        "headroom is a fraction of the budget (0.05 or '5%') or an amount of bytes ('2GB'), "
        f"got {headroom!r}"
    )


def beyond_device(budget_bytes: int, device: Device) -> str | None:
    """Return a message if a device has less memory than the budget; ``None`` if it has enough.

    A device whose memory is unknown counts as having enough.
    """
    memory_bytes, context_bytes = device.memory_bytes, device.context_bytes or 0
    if memory_bytes is None or budget_bytes <= memory_bytes - context_bytes:
        return None
    context = f", {format_bytes(context_bytes)} of it for its context" if context_bytes else ""
    return f"the budget is more than the {device.title} has: {format_bytes(memory_bytes)}{context}"


def nothing_fits(graph: CostGraph, budget: Budget, least: LeastMemory) -> InfeasibleBudgetError:
    """Build the error for a budget for which no schedule was found."""
    outcome = replay(graph, least.schedule)
    at = outcome.peak_step
    operator = graph.operators[least.schedule.order[at]]
    live = sorted((graph.storages[k] for k in outcome.live_at(at)), key=lambda s: -s.size_bytes)
    where = f" of {operator.module_path!r}" if operator.module_path else ""
    parts = [f"resident {format_bytes(graph.resident_bytes)}"]
    parts += [f"{s.name} {format_bytes(s.size_bytes)}" for s in live[:4]]
    if operator.workspace_bytes:
        parts.append(f"scratch {format_bytes(operator.workspace_bytes)}")
    proof = (
        f"no schedule needs less than {format_bytes(least.lower_bound_bytes)}"
        if least.lower_bound_bytes > budget.usable_bytes
        else "whether a lower one exists is not proven"
    )
    min_budget_bytes = budget.total_for(least.peak_bytes)
    asked, known = "", ""
    if budget.headroom_bytes or budget.fraction:
        asked = f", {format_bytes(budget.headroom_bytes)} of it left as headroom"
        known = f" with its headroom, for a peak of {format_bytes(least.peak_bytes)}"
        proof += ", headroom apart" if least.lower_bound_bytes > budget.usable_bytes else ""
    message = (
        f"No schedule fits in {format_bytes(budget.total_bytes)} ({budget.total_bytes} bytes)"
        f"{asked}. The least budget known to work{known} is {format_bytes(min_budget_bytes)} "
        f"(budget_bytes={min_budget_bytes}); {proof}. What holds it up: {operator.name!r} in the "
        f"{operator.phase}{where}, with {', '.join(parts)}. A smaller batch, a shorter sequence or "
        "an optimizer with less state lowers it."
    )
    return InfeasibleBudgetError(
        message,
        budget_bytes=budget.total_bytes,
        min_budget_bytes=min_budget_bytes,
        lower_bound_bytes=budget.total_for(least.lower_bound_bytes),
    )
