"""Tables of what ran for real: predicted beside measured, and whose measured points beat ours."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.comparing.comparison import Comparison
from planner.comparison_record import ComparisonRow, MeasuredStep

from ..plan_runs import markdown
from .signs import mb, one_line

BUSY = 0.1
"""How far eager beside eager may be from 1 before its figures count as noise."""

BETTER_LEGEND = (
    "A measured peak no higher than that of one of our rows, or one of its budgets, and, beyond "
    "noise, an upper quartile of time / eager below the lower quartile of that row; within noise, "
    "a lower median, but quartiles that overlap. Points that one of our plans is as good as, in "
    "measured peak and median, are neither."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A schedule of one strategy, or a peer, that ran.

    Parameters
    ----------
    row
        The first of its rows.
    measured
        The measurement of all of them.
    budgets_bytes
        Budgets at which the strategy chose it.
    by_itself
        Whether it is also the strategy's own choice without a budget.
    """

    row: ComparisonRow
    measured: MeasuredStep
    budgets_bytes: tuple[int, ...]
    by_itself: bool

    @property
    def name(self) -> str:
        """Its strategy or peer, with a mark if its numbers are wrong."""
        wrong = f" ({self.measured.bits})" if self.measured.bits in ("WRONG", "different") else ""
        return f"{'peer ' if self.row.kind == 'peer' else ''}{self.row.strategy}{wrong}"

    @property
    def timed(self) -> bool:
        """Whether it ran in turn with eager."""
        return not math.isnan(self.measured.ratio)


def was_executed(comparison: Comparison) -> bool:
    """Whether anything was meant to be executed."""
    return (
        comparison.eager is not None
        or bool(comparison.eager_error)
        or any(row.kind == "peer" or row.measured is not None for row in comparison.rows)
    )


def ran(comparison: Comparison) -> list[Ran]:
    """What ran: for each strategy its distinct schedules by falling peak, then the peers.

    Rows over their budget are left out: their schedules ran because another row has them.
    """
    groups: dict[tuple[object, ...], list[ComparisonRow]] = {}
    for row in comparison.rows:
        if row.measured is not None and row.fits is not False:
            # NaN is not equal to itself, but its text is.
            key = (row.kind, row.strategy, *_schedule(row))
            groups.setdefault(key, []).append(row)
    found = [
        Ran(
            row=rows[0],
            measured=rows[0].measured,
            budgets_bytes=tuple(sorted(r.budget_bytes for r in rows if r.budget_bytes is not None)),
            by_itself=any(r.budget_bytes is None for r in rows),
        )
        for rows in groups.values()
        if rows[0].measured is not None
    ]
    names = [row.strategy for row in comparison.rows]
    return sorted(
        found,
        key=lambda r: (r.row.kind == "peer", names.index(r.row.strategy), -r.measured.peak_bytes),
    )


def failed_rows(comparison: Comparison) -> list[ComparisonRow]:
    """Rows that should have run but have no figures; a schedule once for each strategy."""
    found = {
        (row.kind, row.strategy, row.predicted_peak_bytes, row.error): row
        for row in comparison.rows
        if row.measured is None
        and (row.kind == "peer" or (row.fits is not False and row.predicted_peak_bytes is not None))
    }
    return list(found.values()) if was_executed(comparison) else []


def executed_part(comparison: Comparison) -> str:
    """Where it ran, eager's figures, the table, failures and remarks."""
    parts = ["\n".join(f"- {line}" for line in executed_facts(comparison))]
    if table := measured_table(comparison):
        parts.append(table.rstrip("\n"))
    if failed := failed_rows(comparison):
        lines = [
            [_kind(r), r.strategy, _asked(comparison, r), one_line(r.error or "it did not run")]
            for r in failed
        ]
        header = ["failed", "name", "budget", "why"]
        parts.append(markdown(header, lines).rstrip("\n"))
    said = dict.fromkeys(words for one in ran(comparison) if (words := _remark(one)))
    if said:
        parts.append("\n".join(f"- {words}" for words in said))
    return "\n\n".join(parts)


def _remark(one: Ran) -> str:
    """What differs from eager's numbers, and a peer's own note."""
    note = one.row.note if one.row.kind == "peer" else ""
    words = "; ".join(text for text in (note, one.measured.difference) if text)
    return f"{one.name}: {one_line(words)}" if words else ""


def executed_facts(comparison: Comparison) -> list[str]:
    """The machine, eager beside itself, and reasons to doubt the figures."""
    c = comparison
    threads = "" if c.num_threads is None else f", {c.num_threads} thread(s)"
    under = f", autocast {c.autocast}" if c.autocast else ""
    torch = f", torch {c.versions['torch']}" if "torch" in c.versions else ""
    load = c.machine.get("load_average")
    lines = [
        f"{c.measured_on or 'an unknown device'}{threads}, {c.dtype or 'unknown dtype'}{under}, "
        f"{c.optimizer or 'no optimizer'}, {c.repeats} pairs asked for{torch}"
        + (f", {c.machine['date']}" if "date" in c.machine else "")
        + (f", load average {load:.2f}" if isinstance(load, float) else "")
    ]
    if c.eager is None:
        return [
            *lines,
            f"**eager steps failed**: {one_line(c.eager_error or 'no reason was kept')}",
        ]
    low, high = c.eager.quartiles
    lines.append(
        f"eager: {mb(c.eager.peak_bytes)} measured, {mb(c.baseline_peak_bytes)} predicted"
        + (
            f"; {c.eager.step_us / 1e3:.1f} ms; beside itself {c.eager.ratio:.3f} ({low:.3f} to "
            f"{high:.3f}, {c.eager.num_pairs} pairs); bits {c.eager.bits}"
            if c.eager.num_pairs
            else "; not timed"
        )
    )
    if c.eager.num_pairs and (low < 1 - BUSY or high > 1 + BUSY):
        lines.append(
            f"**warning**: eager beside itself differs by more than {BUSY:.0%}: the machine was "
            "too busy, or the pairs too few, for measured times"
        )
    elif c.eager.num_pairs and not low <= 1 <= high:
        lines.append("**warning**: eager beside itself is on one side of 1: measured times lean")
    return lines


def measured_table(comparison: Comparison) -> str:
    """A line for each schedule of each strategy, then peers; empty if nothing ran."""
    found = ran(comparison)
    if not found:
        return ""
    rows, before = [], ""
    for one in found:
        m, row = one.measured, one.row
        label = f"**{row.strategy}**" if row.strategy == comparison.ours else row.strategy
        over = any(m.peak_bytes > budget for budget in one.budgets_bytes)
        rows.append(
            [
                "" if row.strategy == before else label,
                "peer" if row.kind == "peer" else _budgets(comparison, one),
                "" if row.predicted_peak_bytes is None else mb(row.predicted_peak_bytes),
                mb(m.peak_bytes) + (" **over**" if over else ""),
                "" if row.overhead is None else f"{1 + row.overhead:.3f}",
                _ratio(one),
                m.bits if m.bits in ("equal", "right") else f"**{m.bits}**",
            ]
        )
        before = row.strategy
    header = ["strategy", "budget, of the unplanned peak", "peak predicted", "measured"]
    return markdown([*header, "time / eager predicted", "measured (quartiles)", "bits"], rows)


def executed_summary(comparisons: Mapping[str, Comparison]) -> str:
    """A line for each model that ran, and what the columns mean; empty if none did."""
    lines = [_summary(m, c) for m, c in comparisons.items() if was_executed(c)]
    if not lines:
        return ""
    ran_header = [
        "model",
        "eager beside itself",
        "schedules run",
        "bits",
        "predicted peak off by at most",
        "over their budget",
        "not run",
        "predicted overhead off by, points: median, 90 %, most",
    ]
    better_header = ["model", "strategies beyond noise", "strategies within noise", "peers beyond"]
    better = [_better(m, c) for m, c in comparisons.items() if was_executed(c)]
    tables = [markdown(ran_header, lines), f"Measured better than ours:\n\n{BETTER_LEGEND}"]
    return "\n\n".join(part.rstrip("\n") for part in (*tables, markdown(better_header, better)))


def _summary(model: str, comparison: Comparison) -> list[str]:
    planned = [one for one in ran(comparison) if one.row.kind == "strategy"]
    distinct = {_schedule(one.row): one for one in planned}
    bits = Counter(one.measured.bits for one in distinct.values())
    over = [one for one in planned if any(one.measured.peak_bytes > b for b in one.budgets_bytes)]
    return [
        model,
        _eager_beside_itself(comparison),
        str(len(distinct)),
        ", ".join(f"{count} {word}" for word, count in bits.items()) or "–",
        _peak_error(list(distinct.values())),
        str(len({_schedule(one.row) for one in over})),
        str(len(failed_rows(comparison))),
        _overhead_errors(list(distinct.values())),
    ]


def _eager_beside_itself(comparison: Comparison) -> str:
    eager = comparison.eager
    if eager is None or not eager.num_pairs:
        return "–"
    low, high = eager.quartiles
    return f"{eager.ratio:.3f} ({low:.3f} to {high:.3f})"


def _peak_error(found: Sequence[Ran]) -> str:
    """The largest error with its sign: above zero, a step took more than predicted."""
    errors = [
        one.measured.peak_bytes - one.row.predicted_peak_bytes
        for one in found
        if one.row.predicted_peak_bytes is not None
    ]
    worst = max(errors, key=abs, default=None)
    return "–" if worst is None else f"{worst:+d} B" if worst else "0 B"


def _overhead_errors(found: Sequence[Ran]) -> str:
    """How far time / eager was from the prediction, over all timed schedules."""
    errors = sorted(
        100 * abs(one.measured.ratio - 1 - one.row.overhead)
        for one in found
        if one.timed and one.row.overhead is not None
    )
    if not errors:
        return "–"
    at_90 = errors[math.ceil(0.9 * len(errors)) - 1]
    return f"{statistics.median(errors):.1f}, {at_90:.1f}, {errors[-1]:.1f}"


def _better(model: str, comparison: Comparison) -> list[str]:
    beat, noise = beating(comparison, ran(comparison))
    return [
        model,
        _named([one for one in beat if one.row.kind == "strategy"]),
        _named([one for one in noise if one.row.kind == "strategy"]),
        _named([one for one in beat if one.row.kind == "peer"]),
    ]


def beating(comparison: Comparison, found: Sequence[Ran]) -> tuple[list[Ran], list[Ran]]:
    """Those whose measured point beats one of ours: beyond noise, and within it.

    Beyond noise: a measured peak no higher than that of a row of ours, or one of its
    budgets, and an upper quartile of time / eager below the lower quartile of that
    row. Within noise: a lower median only. Neither if another plan of ours is as good
    as that point.
    """
    timed = [one for one in found if one.timed]
    ours = [one for one in timed if one.row.strategy == comparison.ours]
    beat, noise = [], []
    for one in timed:
        if one.row.strategy == comparison.ours:
            continue
        if any(_as_good(our.measured, one.measured) for our in ours):
            continue  # the same schedule among them
        rows = [our for our in ours if _side_by_side(our, one)]
        if any(one.measured.quartiles[1] < our.measured.quartiles[0] for our in rows):
            beat.append(one)
        elif any(one.measured.ratio < our.measured.ratio for our in rows):
            noise.append(one)
    return beat, noise


def _side_by_side(our: Ran, other: Ran) -> bool:
    """Whether the other needs no more memory than ours, or both were asked at a budget."""
    shared = set(our.budgets_bytes) & set(other.budgets_bytes)
    return other.measured.peak_bytes <= our.measured.peak_bytes or bool(shared)


def _as_good(our: MeasuredStep, other: MeasuredStep) -> bool:
    return our.peak_bytes <= other.peak_bytes and our.ratio <= other.ratio


def _named(found: Sequence[Ran]) -> str:
    named = ", ".join(f"{one.name} at {mb(one.measured.peak_bytes)}" for one in found)
    return f"{len(found)}: {named}" if found else "0"


def _schedule(row: ComparisonRow) -> tuple[object, ...]:
    """A key that tells schedules apart: their predictions, and the figures of one run."""
    return row.predicted_peak_bytes, row.predicted_step_us, repr(row.measured)


def _budgets(comparison: Comparison, one: Ran) -> str:
    unplanned = comparison.baseline_peak_bytes
    words = [f"{b / unplanned:.0%}" for b in one.budgets_bytes]
    return ", ".join([*dict.fromkeys(words), *["own choice"] * one.by_itself])


def _asked(comparison: Comparison, row: ComparisonRow) -> str:
    if row.kind == "peer":
        return ""
    if row.budget_bytes is None:
        return "its own choice"
    return f"{row.budget_bytes / comparison.baseline_peak_bytes:.0%}"


def _kind(row: ComparisonRow) -> str:
    return "peer" if row.kind == "peer" else "schedule"


def _ratio(one: Ran) -> str:
    low, high = one.measured.quartiles
    return f"{one.measured.ratio:.3f} ({low:.3f} to {high:.3f})" if one.timed else "not timed"
