"""The largest batches in words, for ``print(max_batch(…))``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graph_capture.units import format_bytes, format_us

from .estimate_report import format_rate

if TYPE_CHECKING:
    from .max_batch import MaxBatch


def report(found: MaxBatch) -> str:
    """Some five lines: both batches, what is known of the next one, and what it took."""
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
            f"Largest batch in {format_bytes(found.budget_bytes)}{headroom} on {found.device}",
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
