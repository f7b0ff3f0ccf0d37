"""The byte budget, as users write it, and what to say when nothing fits it."""

from __future__ import annotations

from graph_capture.cost_graph import CostGraph
from graph_capture.target import Target
from graph_capture.units import format_bytes, parse_bytes
from solvers.least_memory import LeastMemory
from solvers.replay import replay

from .errors import InfeasibleBudgetError


def parse_budget(budget_gb: float | str | None, budget_bytes: int | str | None) -> int:
    """The budget in bytes; exactly one of the two must be given.

    >>> parse_budget("1GiB", None)
    1073741824

    Raises
    ------
    ValueError
        When none or both are given, or it is no positive amount.
    """
    if (budget_gb is None) == (budget_bytes is None):
        raise ValueError("give the budget once: budget_gb=40, budget_gb='40GiB' or budget_bytes=…")
    if budget_gb is not None:
        return parse_bytes(budget_gb, default_unit="gb")
    assert budget_bytes is not None
    return parse_bytes(budget_bytes, default_unit="b")


def parse_headroom(headroom: float | str | None, budget_bytes: int, target: Target) -> int:
    """Bytes of the budget that a plan leaves alone.

    Parameters
    ----------
    headroom
        A fraction of the budget below one, a number of bytes from one on, a
        string such as ``"2GB"``, or ``None`` for the device's default.

    Raises
    ------
    ValueError
        When it is negative or leaves nothing.
    """
    if headroom is None:
        return 0
    if isinstance(headroom, bool) or not isinstance(headroom, (int, float, str)):
        raise ValueError(f"headroom is a fraction or bytes, got {headroom!r}")
    if isinstance(headroom, str):
        num_bytes = parse_bytes(headroom, default_unit="b")
    else:
        num_bytes = int(headroom * budget_bytes if 0 <= headroom < 1 else headroom)
    if not 0 <= num_bytes < budget_bytes:
        raise ValueError(f"headroom={headroom!r} leaves nothing of {format_bytes(budget_bytes)}")
    return num_bytes


def nothing_fits(graph: CostGraph, budget_bytes: int, least: LeastMemory) -> InfeasibleBudgetError:
    """The error for a budget that no schedule was found for."""
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
        if least.lower_bound_bytes > budget_bytes
        else "whether a lower one exists is not proven"
    )
    message = (
        f"No schedule fits in {format_bytes(budget_bytes)} ({budget_bytes} bytes). "
        f"The least budget known to work is {format_bytes(least.peak_bytes)} "
        f"(budget_bytes={least.peak_bytes}); {proof}. What holds it up: {operator.name!r} in the "
        f"{operator.phase}{where}, with {', '.join(parts)}. A smaller batch, a shorter sequence or "
        "an optimizer with less state lowers it."
    )
    return InfeasibleBudgetError(
        message,
        budget_bytes=budget_bytes,
        min_budget_bytes=least.peak_bytes,
        lower_bound_bytes=least.lower_bound_bytes,
    )
