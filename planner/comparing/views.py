"""Convert a comparison to flat records and to a data frame."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..comparison_record import BudgetBound, ComparisonRecord, ComparisonRow, RowOutcome
from ..compiled_record import CompiledRow
from .compiled_table import name_of_row

if TYPE_CHECKING:
    import pandas

EAGER_STEP = "eager step"
COMPILED_STEP = "compiled step without a budget"
"""What a record's measured ratio, bits and errors are against."""


def records(comparison: ComparisonRecord) -> list[dict[str, Any]]:
    """See :meth:`Comparison.records`."""
    bounds = {(b.budget, b.budget_bytes): b for b in comparison.bounds}
    found = [
        _record(comparison, row, bounds.get((row.budget, row.budget_bytes or 0)))
        for row in comparison.rows
    ]
    if comparison.compiled is not None:
        found += [_compiled_record(comparison, row) for row in comparison.compiled.rows]
    return found


def data_frame(comparison: ComparisonRecord) -> pandas.DataFrame:
    """See :meth:`Comparison.to_pandas`."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_pandas needs pandas: pip install 'remat-planner[research]'; records() gives the "
            "same without it"
        ) from error
    return pandas.DataFrame.from_records(records(comparison))


def _record(
    comparison: ComparisonRecord, row: ComparisonRow, bound: BudgetBound | None
) -> dict[str, Any]:
    measured, peak_bytes = row.measured, row.predicted_peak_bytes
    unplanned_bytes = comparison.baseline_peak_bytes
    return {
        "model": comparison.model,
        "device": comparison.device,
        "cost_model": comparison.cost_model,
        "seed": comparison.seed,
        "fingerprint": comparison.fingerprint,
        "kind": row.kind,
        "strategy": row.strategy,
        "ours": row.strategy == comparison.ours,
        "budget": row.budget,
        "budget_bytes": row.budget_bytes,
        "setting": row.setting,
        "note": row.note,
        "error": row.error,
        "outcome": str(row.outcome),
        "off_order": row.off_order,
        "fits": row.fits,
        "predicted_peak_bytes": peak_bytes,
        "peak_share": None if peak_bytes is None else peak_bytes / unplanned_bytes,
        "predicted_step_us": row.predicted_step_us,
        "overhead": row.overhead,
        "lower_bound_us": None if bound is None else bound.lower_bound_us,
        "bound_scope": None if bound is None else bound.scope,
        "gap": row.gap,
        "num_recomputed": row.num_recomputed,
        "solve_s": row.solve_s,
        "measured_peak_bytes": None if measured is None else measured.peak_bytes,
        "measured_step_us": None if measured is None else _figure(measured.step_us),
        "eager_step_us": None if measured is None else _figure(measured.eager_us),
        "measured_ratio": None if measured is None else _figure(measured.ratio),
        "ratio_low": None if measured is None else _figure(measured.quartiles[0]),
        "ratio_high": None if measured is None else _figure(measured.quartiles[1]),
        "num_pairs": None if measured is None else measured.num_pairs,
        "measured_against": None if measured is None else EAGER_STEP,
        "bits": None if measured is None else measured.bits,
        "gradient_error": None,
        "difference": None if measured is None else measured.difference,
        **_circumstances(comparison),
    }


def _compiled_record(comparison: ComparisonRecord, row: CompiledRow) -> dict[str, Any]:
    """A compiled step as a row: its measured ratio is over the compiled step without a budget."""
    steps = comparison.compiled
    assert steps is not None
    shown = ComparisonRow(
        strategy=f"compiled_{row.kind}",
        budget="" if row.budget_bytes is None else f"{row.budget_bytes}B",
        budget_bytes=row.budget_bytes,
        setting=steps.lower,
        note=name_of_row(row),
        error=row.failure,
        outcome=RowOutcome.FAILED if row.failure else RowOutcome.FOUND,
        predicted_peak_bytes=row.predicted_bytes,
        overhead=row.overhead,
        gap=row.gap,
    )
    ran = {
        "measured_peak_bytes": row.peak_bytes,
        "measured_ratio": row.time_ratio,
        "measured_against": COMPILED_STEP,
        "bits": None if row.peak_bytes is None else row.bits,
        "gradient_error": row.error,
    }
    own = {"kind": "compiled", "ours": row.kind == "remat", **ran}
    if row.is_over_budget:
        own["outcome"] = str(RowOutcome.OVER_BUDGET)
    return _record(comparison, shown, None) | own


def _circumstances(c: ComparisonRecord) -> dict[str, Any]:
    """What was measured, on which machine, and when; the same in every record."""
    return {
        "dtype": c.dtype,
        "autocast": c.autocast,
        "optimizer": c.optimizer,
        "measured_on": c.measured_on,
        "num_threads": c.num_threads,
        "repeats": c.repeats,
        "load_average": c.machine.get("load_average") if c.measured_on else None,
        "date": c.machine.get("date"),
        "versions": "; ".join(f"{name} {version}" for name, version in c.versions.items()),
    }


def _figure(value: float) -> float | None:
    return None if math.isnan(value) else value
