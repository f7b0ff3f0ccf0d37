"""Put a validation together: what was predicted beside what was measured."""

from __future__ import annotations

import statistics

import torch

from graph_capture.cost_graph import Storage
from graph_capture.costs.library_workspace import STORAGE_NAME

from ..plan_record import LIBRARY_WORKSPACE, PlanRecord
from ..running.compiled_calls import CompiledCalls
from .bit_comparison import Verdict
from .measure import quartiles
from .trial import Taken, Trial
from .validation import Figure, Validation


def reported(
    plan: PlanRecord,
    trial: Trial,
    taken: Taken,
    without: Taken | None,
    timing: tuple[list[float], list[float]],
    found: Verdict,
    note: str | None,
    compiled: CompiledCalls | None = None,
) -> Validation:
    """Return the validation of a plan.

    Parameters
    ----------
    trial
        What the steps ran on.
    taken, without
        What the planned step took, and the unplanned one if it ran.
    timing
        Microseconds of unplanned and of planned steps, pair by pair.
    found
        The verdict on the bits.
    note
        Why the unplanned step did not run, if it did not.
    compiled
        What of the planned step was compiled, if anything was to be.
    """
    peak_bytes = plan.predicted_peak_bytes
    predicted = predicted_parts(plan)
    at_peak = [
        Figure(
            name=category,
            predicted=predicted.pop(category, 0),
            measured=num_bytes,
            how="given" if category in ("resident", "bucket") else "observed",
        )
        for category, num_bytes in taken.resident_bytes.items()
    ]
    if compiled is not None and compiled.step_peak_bytes(plan) != peak_bytes:
        # The peak is elsewhere than in the plan: what lies there is known in sum only.
        peak_bytes = compiled.step_peak_bytes(plan)
        predicted = {"around_compiled_code": peak_bytes - sum(int(f.predicted) for f in at_peak)}
    at_peak.append(
        Figure(
            name="rest",
            predicted=sum(predicted.values()),
            measured=taken.rest_bytes,
            how="derived",
        )
    )
    first_us, second_us = timing
    ratios = [b / a for a, b in zip(first_us, second_us, strict=True)] if first_us else []
    low, high = quartiles(ratios)
    return Validation(
        peak=Figure(name="peak", predicted=peak_bytes, measured=taken.peak_bytes),
        reserved_bytes=taken.reserved_bytes,
        at_peak=tuple(f for f in at_peak if f.predicted or f.measured),
        predicted_rest=predicted,
        in_step=(
            _whole("gradient", plan, taken.gradient_bytes),
            _whole("output", plan, taken.output_bytes),
        ),
        step=_median("step", plan.predicted_step_us, second_us),
        unplanned_peak=None
        if without is None
        else Figure(
            name="unplanned peak", predicted=plan.baseline_peak_bytes, measured=without.peak_bytes
        ),
        unplanned_step=_median("unplanned step", plan.baseline_step_us, first_us),
        predicted_overhead=plan.overhead,
        overhead=statistics.median(ratios) - 1 if ratios else None,
        overhead_quartiles=(low - 1, high - 1) if ratios else None,
        bits=found.bits,
        first_difference=found.difference,
        unplanned_note=note,
        budget_bytes=plan.budget_bytes,
        headroom_bytes=plan.headroom_bytes,
        costs=f"{plan.costs.model} for {plan.costs.device}",
        device=torch.cuda.get_device_name(trial.device)
        if trial.device.type == "cuda"
        else trial.device.type,
        torch_version=torch.__version__,
        num_threads=torch.get_num_threads(),
        seed=trial.seed,
        num_pairs=len(ratios),
        compiled=compiled,
        gradient_error=found.gradient_error,
        tolerance=found.tolerance,
    )


def predicted_parts(plan: PlanRecord) -> dict[str, int]:
    """The predicted peak by category; a library's workspace is not a buffer of the model.

    A recorded step makes the workspace itself, so it counts as part of the rest.
    """
    parts: dict[str, int] = dict(plan.memory.by_category)
    if LIBRARY_WORKSPACE in parts:
        parts[STORAGE_NAME] = parts.pop(LIBRARY_WORKSPACE)
    return parts


def _whole(category: str, plan: PlanRecord, measured_bytes: int) -> Figure:
    """What a step leaves in a category; what the loss leaves stays in the training loop."""

    def stays(storage: Storage) -> bool:
        if storage.producer is None:  # earlier gradients, to which the step's own were added
            return True
        return storage.kept and plan.graph.operators[storage.producer].phase != "loss"

    predicted = sum(
        s.size_bytes for s in plan.graph.storages if s.category == category and stays(s)
    )
    return Figure(name=f"{category}s", predicted=predicted, measured=measured_bytes)


def _median(name: str, predicted_us: float, measured_us: list[float]) -> Figure | None:
    if not measured_us:
        return None
    return Figure(name=name, predicted=predicted_us, measured=statistics.median(measured_us))


__all__ = ["predicted_parts", "reported"]
