"""Plans of one step at many budgets in words, for ``print(frontier(…))``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from graph_capture.units import format_bytes, format_us

from ..plan_record import PlanRecord

PlanT = TypeVar("PlanT", bound=PlanRecord)
"""The type of the plans that the caller gets: :class:`planner.Plan`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint(Generic[PlanT]):
    """What one budget buys.

    Parameters
    ----------
    budget_bytes
        The budget.
    plan
        The plan for it; ``None`` where nothing is known to fit.
    least_budget_bytes
        Where there is no plan, the least budget known to work.
    """

    budget_bytes: int
    plan: PlanT | None = None
    least_budget_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier(Generic[PlanT]):
    """Plans of one step, from the least memory up; ``str()`` is a table.

    Parameters
    ----------
    model
        Class of the model.
    granularity
        As of :func:`planner.optimize`.
    device
        In words.
    unplanned_peak_bytes
        Peak of the step without a plan.
    points
        One for each budget.
    capture_s, total_s
        Wall-clock time of the capture, and of all.
    """

    model: str
    granularity: str
    device: str
    unplanned_peak_bytes: int
    points: tuple[FrontierPoint[PlanT], ...]
    capture_s: float
    total_s: float

    @property
    def plans(self) -> tuple[PlanT, ...]:
        """The plans, from the lowest budget up."""
        return tuple(point.plan for point in self.points if point.plan is not None)

    def within(self, budget_bytes: int) -> PlanT | None:
        """Return the fastest plan whose own budget is within this one; ``None`` for none."""
        fitting = [plan for plan in self.plans if plan.budget_bytes <= budget_bytes]
        return min(fitting, key=lambda plan: plan.predicted_step_us, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, ready for JSON; each plan is saved in its own file."""
        return {
            "model": self.model,
            "granularity": self.granularity,
            "device": self.device,
            "unplanned_peak_bytes": self.unplanned_peak_bytes,
            "capture_s": self.capture_s,
            "total_s": self.total_s,
            "points": [_figures(point) for point in self.points],
        }

    def __str__(self) -> str:
        return report(self)


def _figures(point: FrontierPoint[Any]) -> dict[str, Any]:
    plan = point.plan
    if plan is None:
        return {
            "budget_bytes": point.budget_bytes,
            "least_budget_bytes": point.least_budget_bytes,
        }
    return {
        "budget_bytes": point.budget_bytes,
        "peak_bytes": plan.predicted_peak_bytes,
        "step_us": plan.predicted_step_us,
        "overhead": plan.overhead,
        "lower_bound_us": plan.lower_bound_us,
        "gap": plan.gap,
        "solve_s": plan.solve_s,
    }


def report(found: Frontier[Any]) -> str:
    """One line for each budget."""
    how = "in blocks" if found.granularity == "blocks" else "as a whole"
    number = len(found.points)
    lines = [
        f"{found.model} planned {how} at {number} budget{'s' * (number != 1)} for {found.device}; "
        f"without a plan {format_bytes(found.unplanned_peak_bytes)}",
        f"  {'budget':>10} {'of it':>7} {'peak':>10} {'step':>10} {'overhead':>9} {'gap':>7}",
    ]
    for point in found.points:
        plan = point.plan
        share = point.budget_bytes / max(1, found.unplanned_peak_bytes)
        begin = f"  {format_bytes(point.budget_bytes):>10} {share:>7.1%}"
        if plan is None:
            least = point.least_budget_bytes
            known = "" if least is None else f"; the least known to work is {format_bytes(least)}"
            lines.append(f"{begin} no plan{known}")
            continue
        lines.append(
            f"{begin} {format_bytes(plan.predicted_peak_bytes):>10} "
            f"{format_us(plan.predicted_step_us):>10} {plan.overhead:>9.2%} {plan.gap:>7.3%}"
        )
    lines.append(f"  captured in {found.capture_s:.1f} s, all in {found.total_s:.1f} s")
    return "\n".join(lines)
