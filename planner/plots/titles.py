"""Titles of figures: what they show, on which device, in which dtype."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..plan_record import PlanRecord

if TYPE_CHECKING:
    from ..comparison_record import ComparisonRecord

LONGEST_LINE = 104
"""Characters that a figure is wide."""
_NO_BREAK = "\u00a0"


def title_of_plan(title: str, plans: Sequence[PlanRecord]) -> str:
    """The title, and in a second line device, dtype and cost model of the first plan."""
    if not plans:
        return title
    plan = plans[0]
    parts = [plan.costs.device, *_dtypes(plan), f"{plan.costs.model} times"]
    return f"{title}\n{', '.join(part for part in parts if part)}"


def title_of_comparison(
    what: str, comparison: ComparisonRecord, *, predicted: bool = True, measured: bool = False
) -> str:
    """Model and what is shown, then a line for each kind of figures that are shown.

    Predicted figures are for the device of the cost table, measured ones for the
    machine that the steps ran on: these need not be the same.
    """
    common = [comparison.dtype]
    if comparison.autocast:
        common.append(f"autocast {comparison.autocast}")
    common.append(comparison.optimizer)
    torch_version = comparison.versions.get("torch")
    if torch_version:
        common.append(f"torch {torch_version}")
    lines = []
    if predicted:
        lines.append([f"predicted times ({comparison.cost_model}) for {comparison.device}"])
    if measured:
        lines.append(_measured_on(comparison))
    lines[-1] += common
    first = textwrap.wrap(f"{comparison.model}: {what}", LONGEST_LINE)
    return "\n".join([*first, *(part for line in lines for part in _broken(line))])


def _broken(parts: Sequence[str]) -> list[str]:
    """Lines no wider than the figure, each of whole parts."""
    whole = ", ".join(part.replace(" ", _NO_BREAK) for part in parts if part)
    return [line.replace(_NO_BREAK, " ") for line in textwrap.wrap(whole, LONGEST_LINE)]


def _measured_on(comparison: ComparisonRecord) -> list[str]:
    """Machine, threads and pairs of steps."""
    parts = [f"measured on {comparison.measured_on or 'a machine that was not recorded'}"]
    if comparison.num_threads is not None:
        parts.append(_counted(comparison.num_threads, "thread"))
    pairs = [r.measured.num_pairs for r in comparison.rows if r.measured is not None]
    if any(pairs):
        least, most = min(n for n in pairs if n), max(pairs)
        spread = f"{least} to " if least < most else ""
        parts.append(f"{spread}{_counted(most, 'pair')} of steps")
    return parts


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _dtypes(plan: PlanRecord) -> list[str]:
    """The dtype of most of the model's numbers, and autocast's."""
    sizes: Counter[str] = Counter()
    for spec in plan.guard.state.values():
        count = 1
        for length in spec.shape:
            count *= length
        sizes[str(spec.dtype).removeprefix("torch.")] += count
    names = [sizes.most_common(1)[0][0]] if sizes else []
    if plan.guard.autocast is not None:
        names.append(f"autocast {plan.guard.autocast.removeprefix('torch.')}")
    return names
