"""Format a comparison as a table for people."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from graph_capture.units import format_bytes, format_us

from ..comparison_record import BudgetBound, ComparisonRecord, ComparisonRow, MeasuredStep
from .bound_text import (
    EAGERS_ORDER,
    OTHER_ORDER,
    bytes_rounded_down,
    percent_rounded_down,
    scope_words,
)
from .compiled_table import compiled_lines

_LONGEST_SETTING = 22
_LONGEST_ERROR = 80  # in its row; longer ones are printed in full below the rows
_WIDTH = 120
_BUSY = 0.1
_WRONG_MODEL = 3.0
_PREDICTED = ("peak", "of unplanned", "overhead", "gap", "runs again", "solve")
_MEASURED = ("measured peak", "step / eager", "quartiles", "bits")


def table(comparison: ComparisonRecord) -> str:
    """See :meth:`Comparison.__str__`."""
    lines = list(_head(comparison))
    shows = _shows_measured(comparison)
    for bound in comparison.bounds:
        asked = (bound.budget, bound.budget_bytes)
        rows = [r for r in comparison.rows if (r.budget, r.budget_bytes) == asked]
        rows = [r for r in rows if r.kind == "strategy"]
        lines += ["", _budget_line(comparison, bound), *_block(comparison, rows, shows)]
    own = [r for r in comparison.rows if not r.budget and r.kind == "strategy"]
    if own:
        lines += ["", "no budget: each strategy's own choice", *_block(comparison, own, shows)]
    peers = [r for r in comparison.rows if r.kind == "peer"]
    if peers:
        lines += ["", "other tools, as their users run them", *_block(comparison, peers, shows)]
    if comparison.compiled is not None:
        lines += ["", *compiled_lines(comparison.compiled)]
    notes = [line for note in _notes(comparison) for line in textwrap.wrap(note, _WIDTH)]
    lines += ["", *notes] if notes else []
    return "\n".join(line.rstrip() for line in lines)


def _head(c: ComparisonRecord) -> Iterator[str]:
    under = f"autocast {c.autocast}" if c.autocast else ""
    torch = f"torch {c.versions['torch']}" if "torch" in c.versions else ""
    step = ", ".join(part for part in (c.dtype, under, c.optimizer, torch) if part)
    yield f"{c.model}: {step}{', ' if step else ''}seed {c.seed}"
    yield f"predicted: times by {c.cost_model} for {c.device}"
    if c.measured_on:
        yield f"measured: {_measured_on(c)}"
    yield (
        f"unplanned: peak {format_bytes(c.baseline_peak_bytes)}, step "
        f"{format_us(c.baseline_step_us)} predicted{_eager(c)}"
    )
    yield (
        f"least peak known to be possible {format_bytes(c.least_bytes)}, proven impossible below "
        f"{bytes_rounded_down(c.least_bound_bytes)} {EAGERS_ORDER}"
    )
    if any(row.strategy == c.ours for row in c.rows):
        if c.least_solve_s is not None:
            yield (
                f"searching for it took {c.least_solve_s:.2f} s, which is in no solve time below, "
                "though ours starts from what was found"
            )
        yield f"* marks ours ({c.ours})"
    if c.compiled is not None:
        yield "rows are of eager steps, against eager's; those of the last table of compiled ones"


def _measured_on(c: ComparisonRecord) -> str:
    parts = [c.measured_on]
    if c.num_threads is not None:
        parts.append(f"{c.num_threads} thread{'s' * (c.num_threads != 1)}")
    parts.append(f"{c.repeats} pair{'s' * (c.repeats != 1)} of steps asked for")
    load = c.machine.get("load_average")
    if isinstance(load, (int, float)):
        parts.append(f"load average {load:.2f} at the start")
    return ", ".join(parts)


def _eager(c: ComparisonRecord) -> str:
    if c.eager is None:
        return f"; eager steps failed: {_line(c.eager_error)}" if c.eager_error else ""
    text = f"; {format_bytes(c.eager.peak_bytes)} measured"
    if c.eager.num_pairs:
        low, high = c.eager.quartiles
        text += (
            f", {format_us(c.eager.step_us)} (eager beside eager: quartiles {low:.3f} to "
            f"{high:.3f}, {c.eager.num_pairs} pairs)"
        )
    return text


def _notes(c: ComparisonRecord) -> Iterator[str]:
    """What readers should know before they trust the figures."""
    none = next((r.predicted_peak_bytes for r in c.rows if r.strategy == "none"), None)
    if none is not None and none < c.baseline_peak_bytes:
        yield (
            "note: 'none' may peak below the unplanned step, since schedules write results over "
            "arguments that are not used again"
        )
    if c.eager is None or not c.eager.num_pairs:
        return
    low, high = c.eager.quartiles
    if low < 1 - _BUSY or high > 1 + _BUSY:
        yield (
            f"warning: eager steps beside eager steps differ by more than {_BUSY:.0%} (quartiles "
            f"{low:.3f} to {high:.3f}): the machine is too busy, or {c.eager.num_pairs} pairs are "
            "too few, for measured times; free it, use fewer threads (torch.set_num_threads), or "
            "ask for more repeats"
        )
    elif low > 1 or high < 1:
        yield (
            f"warning: eager steps beside eager steps are one-sided (quartiles {low:.3f} to "
            f"{high:.3f}): differences of that size are noise; ask for more repeats"
        )
    ratio = c.eager.step_us / c.baseline_step_us if c.baseline_step_us else 1.0
    if not 1 / _WRONG_MODEL <= ratio <= _WRONG_MODEL:
        small = " (small calls take mostly Python's dispatch)" if ratio > 1 else ""
        better = "" if c.cost_model == "profile" else '; use cost_model="profile"'
        yield (
            f"warning: the unplanned step takes {format_us(c.eager.step_us)} and was predicted to "
            f"take {format_us(c.baseline_step_us)}: predicted overheads come from a cost model, "
            f"{c.cost_model}, that does not fit this step{small}{better}"
        )


def _budget_line(c: ComparisonRecord, bound: BudgetBound) -> str:
    text = f"budget {bound.budget}: {format_bytes(bound.budget_bytes)}"
    if bound.lower_bound_us is None:
        return f"{text}; proven: nothing fits {scope_words(bound.scope)}"
    overhead = bound.lower_bound_us / c.baseline_step_us - 1 if c.baseline_step_us else 0.0
    least = percent_rounded_down(overhead)
    return f"{text}; proven: no overhead below {least} {scope_words(bound.scope)}"


def _shows_measured(c: ComparisonRecord) -> bool:
    return c.eager is not None or bool(c.eager_error) or any(r.measured for r in c.rows)


def _block(c: ComparisonRecord, rows: Sequence[ComparisonRow], shows_measured: bool) -> list[str]:
    header = ("", "strategy", "setting", *_PREDICTED, *(_MEASURED if shows_measured else ()))
    width = len(header)
    cells = [header, *(_cells(c, row, shows_measured) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(width)]
    lines: list[str] = []
    whole: list[str] = []

    def error(of: ComparisonRow) -> str:
        text = _line(of.error)
        if len(text) <= _LONGEST_ERROR:
            return text
        mark = f"({len(whole) + 1})"
        whole.append(f"{mark} {of.strategy}: {text}")
        return f"failed, see {mark} below"

    for row, of in zip(cells, (None, *rows), strict=True):
        left = "  ".join(cell.ljust(n) for cell, n in zip(row[:3], widths[:3], strict=True))
        if of is not None and of.error and of.predicted_peak_bytes is None and not of.measured:
            name = "  ".join(cell.ljust(n) for cell, n in zip(row[:2], widths[:2], strict=True))
            lines.append(f"{name}  {error(of)}")
            continue
        right = "  ".join(cell.rjust(n) for cell, n in zip(row[3:], widths[3:], strict=True))
        lines.append(f"{left}  {right}")
        if of is not None and of.error:
            lines.append(f"{'':{widths[0]}}  {error(of)}")
        if of is not None and (note := _shown_note(of)):
            indent = " " * (widths[0] + 2)
            lines += textwrap.wrap(
                f"{of.strategy}: {note}",
                _WIDTH,
                initial_indent=indent,
                subsequent_indent=indent + "  ",
            )
    for text in whole:
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * 6,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _shown_note(row: ComparisonRow) -> str:
    """What readers of the figures must know; the strategies' own notes are in the records."""
    if row.kind == "peer":
        return _line(row.note)
    return OTHER_ORDER if row.off_order else ""


def _cells(c: ComparisonRecord, row: ComparisonRow, shows_measured: bool) -> tuple[str, ...]:
    misses = "" if row.fits is not False else " (misses)"
    share = (
        "" if row.predicted_peak_bytes is None else row.predicted_peak_bytes / c.baseline_peak_bytes
    )
    cells = (
        "*" if row.strategy == c.ours else "",
        row.strategy,
        _cut(row.setting, _LONGEST_SETTING),
        "" if row.predicted_peak_bytes is None else format_bytes(row.predicted_peak_bytes) + misses,
        "" if share == "" else f"{share:.1%}",
        "" if row.overhead is None else f"{row.overhead:+.2%}",
        "" if row.gap is None else f"{row.gap:.2%}",
        "" if row.num_recomputed is None else f"{row.num_recomputed}",
        "" if row.solve_s is None else f"{row.solve_s:.2f} s",
    )
    return (*cells, *_measured_cells(row.measured)) if shows_measured else cells


def _measured_cells(measured: MeasuredStep | None) -> tuple[str, ...]:
    if measured is None:
        return ("",) * len(_MEASURED)
    low, high = measured.quartiles
    timed = not math.isnan(measured.ratio)
    return (
        format_bytes(measured.peak_bytes),
        f"{measured.ratio:.3f}" if timed else "",
        f"{low:.3f} – {high:.3f}" if timed else "",
        measured.bits,
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str, longest: int) -> str:
    line = _line(text)
    return line if len(line) <= longest else line[: longest - 1] + "…"
