"""The largest batches in words, for ``print(max_batch(…))``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from graph_capture.units import format_bytes, format_us

from ..base.budget import share_text
from ..plan_record import PlanRecord
from .estimate_report import format_rate

PlanT = TypeVar("PlanT", bound=PlanRecord)
"""The type of the plan that the caller gets: :class:`planner.Plan`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxBatch(Generic[PlanT]):
    """The largest batches within a budget.

    Parameters
    ----------
    budget_bytes, headroom_bytes
        Peaks stay below their difference.
    budget_share
        The share of the peak of the sample's own step that was asked for; ``None`` where
        the budget was not given as one.
    device
        In words.
    batch_without_plan
        The largest batch whose unplanned step fits; 0 if none does.
    unplanned_peak_bytes, unplanned_step_us
        Of that step; ``None`` if there is none.
    batch
        The largest batch known to fit with a plan.
    plan
        A plan for it, ready to be applied, with its overhead and gap.
    next_least_bytes
        The least peak known at ``batch + 1``, which does not fit; ``None`` if the search
        ended at its largest batch.
    proven
        Whether a lower bound excludes ``batch + 1``, for every schedule whose
        first runs keep eager's order. If not, a longer search may fit more.
    captured_batches
        Every batch size at which the step was captured, in that order.
    search_s
        Wall-clock time of the whole search.
    """

    budget_bytes: int
    budget_share: float | None
    headroom_bytes: int
    device: str
    batch_without_plan: int
    unplanned_peak_bytes: int | None
    unplanned_step_us: float | None
    batch: int
    plan: PlanT
    next_least_bytes: int | None
    proven: bool
    captured_batches: tuple[int, ...]
    search_s: float

    @property
    def num_captures(self) -> int:
        """How often the step was captured."""
        return len(self.captured_batches)

    @property
    def overhead(self) -> float:
        """Extra time of the planned step over the unplanned one of the same batch, a fraction."""
        return self.plan.overhead

    @property
    def gap(self) -> float:
        """Gap of the plan, see :attr:`Plan.gap`."""
        return self.plan.gap

    @property
    def samples_per_s_without_plan(self) -> float | None:
        """Predicted throughput at the largest batch that needs no plan."""
        if not self.unplanned_step_us:
            return None
        return self.batch_without_plan * 1e6 / self.unplanned_step_us

    @property
    def samples_per_s(self) -> float | None:
        """Predicted throughput at the largest batch with its plan."""
        step_us = self.plan.predicted_step_us
        return self.batch * 1e6 / step_us if step_us else None

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, ready for JSON; the plan is saved in its own file."""
        return {
            "budget_bytes": self.budget_bytes,
            "budget_share": self.budget_share,
            "headroom_bytes": self.headroom_bytes,
            "device": self.device,
            "batch_without_plan": self.batch_without_plan,
            "unplanned_peak_bytes": self.unplanned_peak_bytes,
            "unplanned_step_us": self.unplanned_step_us,
            "samples_per_s_without_plan": self.samples_per_s_without_plan,
            "batch": self.batch,
            "peak_bytes": self.plan.predicted_peak_bytes,
            "step_us": self.plan.predicted_step_us,
            "samples_per_s": self.samples_per_s,
            "overhead": self.overhead,
            "gap": self.gap,
            "next_least_bytes": self.next_least_bytes,
            "proven": self.proven,
            "captured_batches": list(self.captured_batches),
            "search_s": self.search_s,
        }

    def __str__(self) -> str:
        return report(self)


def report(found: MaxBatch[Any]) -> str:
    """Some five lines: both batches, what is known of the next one, and the search's effort."""
    share = (
        ""
        if found.budget_share is None
        else f" ({share_text(found.budget_share)} of the sample's peak without a plan)"
    )
    headroom = (
        f" less {format_bytes(found.headroom_bytes)} headroom" if found.headroom_bytes else ""
    )
    plan = found.plan
    if found.unplanned_peak_bytes is None:
        without = "  without a plan  none, not even a batch of 1"
    else:
        assert found.unplanned_step_us is not None
        without = (
            f"  without a plan  batch {found.batch_without_plan}: peak "
            f"{format_bytes(found.unplanned_peak_bytes)}, step "
            f"{format_us(found.unplanned_step_us)}{_rate(found.samples_per_s_without_plan)}"
        )
    if found.next_least_bytes is None:
        end = f"  batch {found.batch} is the largest that was to be tried"
    elif found.proven:
        end = f"  batch {found.batch + 1} is proven not to fit in eager's order"
    else:
        end = (
            f"  batch {found.batch + 1} is not known to fit (the least peak found is "
            f"{format_bytes(found.next_least_bytes)}); that none fits is not proven"
        )
    captures = ", ".join(map(str, found.captured_batches))
    return "\n".join(
        [
            f"Largest batch in {format_bytes(found.budget_bytes)}{share}{headroom} on "
            f"{found.device}",
            without,
            f"  with a plan     batch {found.batch}: peak "
            f"{format_bytes(plan.predicted_peak_bytes)}, step {format_us(plan.predicted_step_us)} "
            f"(+{plan.overhead:.2%}, gap {plan.gap:.2%}){_rate(found.samples_per_s)}",
            end,
            f"  captured at {found.num_captures} batches ({captures}) in {found.search_s:.1f} s",
        ]
    )


def _rate(samples_per_s: float | None) -> str:
    return "" if samples_per_s is None else f", {format_rate(samples_per_s)} samples/s"
