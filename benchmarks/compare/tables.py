"""The page of tables on which comparisons are published: predictions, model by model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from planner.comparing.comparison import Comparison
from planner.comparison_record import BudgetBound, ComparisonRow

from ..plan_runs import markdown
from .executed import executed_part, executed_summary, was_executed
from .folder import Found
from .match_peak_and_time import MatchedRow
from .paired_runs import LEGEND as PAIRED_RUNS_LEGEND
from .paired_runs import paired_runs_table
from .signs import (
    FAILED,
    LEGEND,
    NOT_APPLICABLE,
    NOTHING_FITS,
    OVER,
    mb,
    mb_rounded_down,
    off_order,
    one_line,
    share_rounded_down,
    sign,
)
from .solve_at_peaks import (
    Point,
    SolvedAtPeak,
    points_of_others,
    points_of_ours,
    took_part,
    uncovered,
)

BELOW_LEGEND = (
    "Points are distinct predicted (peak, time) pairs of all strategies but ours, over a budget or "
    "not; `none`, which recomputes nothing, is one of them. A point was open where no plan of ours "
    "needed as little memory and, to 0.01 %, as little time; of these the ones that no other point "
    "of theirs dominates were decided by solving ours at their own peak. Then every point has "
    "been held against all plans of ours."
)


def report(found: Found) -> str:
    """Everything, the shortest answers first."""
    comparisons, matches, failures = found.comparisons, found.matches, found.failures
    parts = ["# Comparisons", below_table(comparisons, found.at_peak), BELOW_LEGEND]
    if failures:
        lines = [[model, one_line(why)] for model, why in failures.items()]
        parts += ["## Failed", markdown(["model", "why"], lines)]
    if summary := executed_summary(comparisons):
        parts += ["## Executed", summary]
    if in_turn := paired_runs_table(found.paired_runs):
        parts += ["### In turn with ours", in_turn, PAIRED_RUNS_LEGEND]
    if matches:
        parts += ["## At the peaks and costs of others", matched_table(matches)]
    for model, comparison in comparisons.items():
        parts += [f"## {model}", facts(comparison), predicted_table(comparison), LEGEND]
        if reasons := no_figures(comparison):
            parts.append(reasons)
        if was_executed(comparison):
            parts += [f"### Executed: {model}", executed_part(comparison)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def below_table(
    comparisons: Mapping[str, Comparison], at_peak: Mapping[str, Sequence[SolvedAtPeak]]
) -> str:
    """A line for each model: others' points, which of them were open, which are below ours.

    Dashes if ours took no part, so that there is no curve, and if no point of theirs was
    solved.
    """
    header = [
        "model",
        "strategies",
        "rows (over their budget)",
        "distinct points",
        "open at first",
        "solved at their peak (equal to theirs)",
        "below ours",
        "which",
        "our cells (equal to a point of theirs)",
        "our largest gap",
    ]
    return markdown(header, [_below(m, c, at_peak.get(m)) for m, c in comparisons.items()])


def _below(model: str, comparison: Comparison, at_peak: Sequence[SolvedAtPeak] | None) -> list[str]:
    rows = [
        r
        for r in comparison.rows
        if r.kind == "strategy"
        and r.strategy != comparison.ours
        and r.predicted_step_us is not None
    ]
    misses = sum(row.fits is False for row in rows)
    points = points_of_others(comparison)
    names = {name for point in points for name in point.strategies}
    line = [model, str(len(names)), f"{len(rows)} ({misses})", str(len(points))]
    if not took_part(comparison):
        return [*line, *["–"] * 6]
    at_first = uncovered(points, points_of_ours(comparison))
    below = uncovered(points, points_of_ours(comparison, at_peak or ()))
    verdicts = {one.peak_bytes: one.words for one in at_peak or ()}
    which = "; ".join(
        f"{', '.join(p.strategies)} at {mb(p.peak_bytes)}, {_overhead(comparison, p.step_us)}"
        + (f" ({one_line(verdicts[p.peak_bytes])})" if p.peak_bytes in verdicts else "")
        for p in below
    )
    if at_peak is None:  # an open point is not a point below ours
        counts = [str(len(at_first)), "–", "–" if below else "0", which and f"not solved: {which}"]
    else:
        equal = sum((s.ours_peak_bytes, s.ours_us) == (s.peak_bytes, s.theirs_us) for s in at_peak)
        solved = f"{len(at_peak)} ({equal})"
        counts = [str(len(at_first)), solved, str(len(below)), which]
    ours = [r for r in comparison.rows if r.strategy == comparison.ours and r.fits]
    gaps = [r.gap for r in ours if r.gap is not None]
    return [*line, *(c or "–" for c in counts), _cells_of_ours(ours, points), _largest(gaps)]


def _cells_of_ours(ours: Sequence[ComparisonRow], others: Sequence[Point]) -> str:
    """How many there are, and how many have the peak and time of a schedule of theirs.

    The schedule that recomputes nothing belongs to all, and does not count as theirs.
    """
    whose: dict[tuple[int | None, float | None], tuple[str, ...]] = {
        (point.peak_bytes, point.step_us): point.strategies for point in others
    }
    found = [whose.get((r.predicted_peak_bytes, r.predicted_step_us), ()) for r in ours]
    counts = Counter(name for names in found if "none" not in names for name in names)
    named = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{len(ours)} ({named or 'none'})"


def _largest(gaps: Sequence[float]) -> str:
    return f"{max(gaps):.2%}" if gaps else "–"


def facts(comparison: Comparison) -> str:
    """Where predictions come from, and how plans were searched."""
    limit = "" if comparison.time_limit_s is None else f" Solves had {comparison.time_limit_s:g} s"
    if limit and comparison.least_solve_s is not None:
        limit += f", the search for the least peak took {comparison.least_solve_s:.1f} s"
    return (
        f"{comparison.model}; times by {comparison.cost_model} of {comparison.device}, seed "
        f"{comparison.seed}. Unplanned: {mb(comparison.baseline_peak_bytes)}, "
        f"{comparison.baseline_step_us / 1e3:.1f} ms predicted; least peak "
        f"{mb(comparison.least_bytes)} (none below {mb_rounded_down(comparison.least_bound_bytes)} "
        "in eager's order)." + (limit and f"{limit}.")
    )


def predicted_table(comparison: Comparison) -> str:
    """A line for each strategy: overhead at each budget, and the peak and overhead of its own.

    Times are those of the plans found; a solve that found none has no time.
    """
    budgets = list(comparison.bounds)
    header = ["strategy", "longest plan time", "its own choice"]
    header += [_column(comparison, b) for b in budgets]
    cells = {
        (r.strategy, r.budget, r.budget_bytes): r for r in comparison.rows if r.kind == "strategy"
    }
    rows = []
    for name in dict.fromkeys(strategy for strategy, *_ in cells):
        label = f"**{name}**" if name == comparison.ours else name
        own = cells.get((name, "", None))
        found = (cells.get((name, b.budget, b.budget_bytes)) for b in budgets)
        taken = [c.solve_s for (n, *_), c in cells.items() if n == name and c.solve_s is not None]
        longest = f"{max(taken):.2f} s" if taken else OVER
        rows.append([label, longest, _own(own), *(_cell(row) for row in found)])
    bounds = (_bound(comparison, b.lower_bound_us) for b in budgets)
    rows.append(["lower bound, in eager's order", "", "", *bounds])
    return markdown(header, rows)


def no_figures(comparison: Comparison) -> str:
    """Why strategies did not apply or failed, one line per reason; empty if none did."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for row in comparison.rows:
        if row.kind == "strategy" and (found := sign(row)) in (FAILED, NOT_APPLICABLE):
            where.setdefault((row.strategy, found, one_line(row.error)), []).append(
                row.budget or "its own choice"
            )
    lines = []
    for (name, found, error), budgets in where.items():
        at = f", at {', '.join(budgets)}" if found == FAILED else ""
        lines.append(f"- `{name}` ({found}{at}): {error}")
    return "\n".join(lines)


def matched_table(matches: Mapping[str, Sequence[MatchedRow]]) -> str:
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
                rows.append([model, m.strategy, one_line(m.error), *[""] * 7])
                continue
            rows.append(
                [
                    model,
                    m.strategy,
                    mb(m.peak_bytes),
                    f"{m.overhead:.1%}",
                    "–" if m.our_overhead is None else f"{m.our_overhead:.1%}",
                    "–" if m.overhead_ratio is None else f"{m.overhead_ratio:.2f}",
                    m.half_overhead_words,
                    mb(m.our_peak_bytes),
                    "–" if m.peak_ratio is None else f"{m.peak_ratio:.2f}",
                    m.low_peak_words,
                ]
            )
    return markdown(header, rows)


def _column(comparison: Comparison, bound: BudgetBound) -> str:
    share = f"{bound.budget_bytes / comparison.baseline_peak_bytes:.0%}"
    of = f" of {bound.budget}" if bound.budget[:1].isalpha() and bound.budget != "least" else ""
    return f"{mb(bound.budget_bytes)}{of} ({share})"


def _own(row: ComparisonRow | None) -> str:
    if row is None or row.overhead is None:
        return "" if row is None else sign(row)
    return f"{mb(row.predicted_peak_bytes)}, {row.overhead:.1%}{off_order(row)}"


def _cell(row: ComparisonRow | None) -> str:
    if row is None:
        return ""
    return sign(row) or f"{row.overhead:.2%}{off_order(row)}"


def _bound(comparison: Comparison, lower_bound_us: float | None) -> str:
    if lower_bound_us is None:
        return NOTHING_FITS
    return share_rounded_down(lower_bound_us / comparison.baseline_step_us - 1)


def _overhead(comparison: Comparison, step_us: float) -> str:
    return f"{step_us / comparison.baseline_step_us - 1:.3%}"
