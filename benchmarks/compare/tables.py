"""Markdown of comparisons, for the page of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.comparing.comparison import BudgetBound, Comparison, ComparisonRow

from ..plan_runs import markdown
from .matched import Matched

TOLERANCE = 1e-4
"""Share of our time that another strategy may take less: within it a solve counts as optimal."""


def report(
    comparisons: Mapping[str, Comparison],
    matches: Mapping[str, Sequence[Matched]],
    failures: Mapping[str, str],
) -> str:
    """Everything, the shortest answers first."""
    parts = ["# Comparisons", below_table(comparisons)]
    if failures:
        parts += ["## Failed", markdown(["model", "why"], [list(f) for f in failures.items()])]
    if matches:
        parts += ["## At the peaks and costs of others", matched_table(matches)]
    for model, comparison in comparisons.items():
        parts += [f"## {model}", facts(comparison), predicted_table(comparison)]
        measured = measured_table(comparison)
        if measured:
            parts += ["Executed:", measured]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def below_table(comparisons: Mapping[str, Comparison]) -> str:
    """A line for each model: how many points lie below our curve, and which.

    Dashes where ours took no part, so that there is no curve.
    """
    rows = []
    for model, comparison in comparisons.items():
        points = [
            r
            for r in comparison.rows
            if r.kind == "strategy"
            and r.strategy != comparison.ours
            and r.predicted_step_us is not None
        ]
        took_part = any(
            r.strategy == comparison.ours and r.budget_bytes is not None for r in comparison.rows
        )
        below = comparison.below_ours(TOLERANCE) if took_part else ()
        which = ", ".join(f"{r.strategy} at {r.budget or 'its own choice'}" for r in below)
        gaps = [
            r.gap for r in comparison.rows if r.strategy == comparison.ours and r.gap is not None
        ]
        worst = f"{max(gaps):.2%}" if gaps else "–"
        rows.append(
            [model, str(len(points)), str(len(below)) if took_part else "–", which or "–", worst]
        )
    header = ["model", "points of others", "below our curve", "which", "our largest gap"]
    return markdown(header, rows)


def facts(comparison: Comparison) -> str:
    """Where a comparison comes from."""
    return (
        f"{comparison.model}; {comparison.device}, {comparison.cost_model} costs, seed "
        f"{comparison.seed}. Unplanned: {_mb(comparison.baseline_peak_bytes)}, "
        f"{comparison.baseline_step_us / 1e3:.1f} ms predicted; least peak "
        f"{_mb(comparison.least_bytes)} (none below {_mb(comparison.least_bound_bytes)})."
    )


def predicted_table(comparison: Comparison) -> str:
    """A line for each strategy: overhead at each budget, and the peak and overhead of its own."""
    budgets = list(comparison.bounds)
    header = ["strategy", "its own choice"]
    header += [_column(comparison, b) for b in budgets]
    cells = {
        (r.strategy, r.budget, r.budget_bytes): r for r in comparison.rows if r.kind == "strategy"
    }
    rows = []
    for name in dict.fromkeys(strategy for strategy, *_ in cells):
        label = f"**{name}**" if name == comparison.ours else name
        own = cells.get((name, "", None))
        found = (cells.get((name, b.budget, b.budget_bytes)) for b in budgets)
        line = [_own(own), *(_overhead(row) for row in found)]
        rows.append([label, *line])
    rows.append(["lower bound", "", *(_bound(comparison, b.lower_bound_us) for b in budgets)])
    return markdown(header, rows)


def measured_table(comparison: Comparison) -> str:
    """A line for each row that ran: strategies of ours and of others, then peers; else nothing."""
    ran = [row for row in comparison.rows if row.measured is not None]
    failed = [row for row in comparison.rows if row.kind == "peer" and row.measured is None]
    rows = []
    for row in ran:
        m = row.measured
        assert m is not None
        low, high = m.quartiles
        rows.append(
            [
                row.strategy,
                "peer" if row.kind == "peer" else row.budget or "its own choice",
                _mb(row.predicted_peak_bytes),
                _mb(m.peak_bytes),
                "–" if row.overhead is None else f"{1 + row.overhead:.3f}",
                f"{m.ratio:.3f} ({low:.3f} to {high:.3f})",
                m.bits,
            ]
        )
    rows += [[row.strategy, "peer", "", "", "", row.error, ""] for row in failed]
    if not rows:
        return ""
    header = ["strategy", "budget", "peak predicted", "measured", "time / eager predicted"]
    return markdown([*header, "measured (quartiles)", "bits"], rows)


def matched_table(matches: Mapping[str, Sequence[Matched]]) -> str:
    """A line for each model and strategy."""
    header = [
        "model",
        "strategy",
        "its peak",
        "its overhead",
        "ours at its peak",
        "ours / its",
        "at most half?",
        "our least peak at its overhead",
        "ours / its peak",
        "at most 0.7?",
    ]
    rows = []
    for model, found in matches.items():
        for m in found:
            if m.error:
                rows.append([model, m.strategy, m.error, *[""] * 7])
                continue
            rows.append(
                [
                    model,
                    m.strategy,
                    _mb(m.peak_bytes),
                    f"{m.overhead:.1%}",
                    "–" if m.our_overhead is None else f"{m.our_overhead:.1%}",
                    "–" if m.overhead_ratio is None else f"{m.overhead_ratio:.2f}",
                    m.overhead_verdict,
                    _mb(m.our_peak_bytes),
                    "–" if m.peak_ratio is None else f"{m.peak_ratio:.2f}",
                    m.peak_verdict,
                ]
            )
    return markdown(header, rows)


def _column(comparison: Comparison, bound: BudgetBound) -> str:
    share = f"{bound.budget_bytes / comparison.baseline_peak_bytes:.0%}"
    of = f" of {bound.budget}" if bound.budget[:1].isalpha() and bound.budget != "least" else ""
    return f"{_mb(bound.budget_bytes)}{of} ({share})"


def _own(row: ComparisonRow | None) -> str:
    if row is None:
        return ""
    if row.predicted_peak_bytes is None or row.overhead is None:
        return "does not apply"
    return f"{_mb(row.predicted_peak_bytes)}, {row.overhead:.1%}"


def _overhead(row: ComparisonRow | None) -> str:
    if row is None or row.overhead is None or not row.fits:
        return "–"
    return f"{row.overhead:.2%}"


def _bound(comparison: Comparison, lower_bound_us: float | None) -> str:
    if lower_bound_us is None:
        return "nothing fits"
    return f"{lower_bound_us / comparison.baseline_step_us - 1:.2%}"


def _mb(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 1e6:.1f} MB"
