"""What a block plan says beyond a plan of a whole step."""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.printable import printable
from graph_capture.units import format_bytes, format_us

from ..plan_record import PlanRecord
from .block_record import BlockParts


def block_lines(step: PlanRecord, parts: BlockParts) -> str:
    """Return some lines: which blocks have which plan, what is known, how far from the whole."""
    lines = [
        f"  blocks    {len(parts.plan_of)}, with {len(parts.plans)} different plans; all else "
        "runs as it is"
    ]
    for i, paths in parts.alike():
        plan = parts.plans[i]
        lines.append(
            f"            {_named(paths)}: {format_bytes(saved_bytes(plan))} saved for backward, "
            f"{_repeats(plan)}"
        )
    if parts.measured:
        lines.append(
            "  rest      measured in a real step, blocks computed exactly: where the rest takes "
            "another way, its memory may differ"
        )
    else:
        lines.append("  rest      captured: the budget knows all of the step exactly")
    whole = parts.whole
    if whole is not None:
        bound = whole.lower_bound_us / step.baseline_step_us - 1
        known = (
            "no plan of it was found in the time"
            if whole.step_us is None
            else f"{whole.step_us / step.baseline_step_us - 1:+.2%} by a plan of it"
        )
        lines.append(
            f"  whole     the same budget for the whole step: {known}, at least "
            f"{max(0, bound):+.2%}"
        )
    return "\n".join(map(printable, lines))


def saved_bytes(plan: PlanRecord) -> int:
    """Bytes of its own that a block saves from its forward to its backward."""
    order = plan.schedule.order
    turn = next(i for i, v in enumerate(order) if plan.graph.operators[v].phase == "loss")
    return sum(
        plan.graph.storages[k].size_bytes
        for k, born, last in plan.replay.live
        if born < turn < last and plan.graph.storages[k].category != "output"
    )


def _repeats(plan: PlanRecord) -> str:
    repeats = plan.schedule.recomputed()
    if not repeats:
        return "nothing repeated"
    cost_ns = sum(times * plan.graph.operators[v].cost_ns for v, times in repeats.items())
    return f"{sum(repeats.values())} operators repeated ({format_us(cost_ns / 1e3)})"


def _named(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
