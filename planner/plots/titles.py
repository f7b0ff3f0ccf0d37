"""What stands above a figure: what it shows, on which device, in which dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..comparing.comparison import Comparison
    from ..plan import Plan


def title_of_plan(title: str, plans: Sequence[Plan]) -> str:
    """The title, and in a second line device, dtype and cost model of the first plan."""
    if not plans:
        return title
    plan = plans[0]
    parts = [plan.costs.device, *_dtypes(plan), f"{plan.costs.model} times"]
    return f"{title}\n{', '.join(part for part in parts if part)}"


def title_of_comparison(what: str, comparison: Comparison) -> str:
    """Model and what is shown, and in a second line device, cost model and torch's version."""
    parts = [comparison.device, f"{comparison.cost_model} times"]
    torch_version = comparison.versions.get("torch")
    if torch_version:
        parts.append(f"torch {torch_version}")
    return f"{comparison.model}: {what}\n{', '.join(parts)}"


def _dtypes(plan: Plan) -> list[str]:
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
