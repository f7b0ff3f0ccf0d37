"""An estimate in words: a table of its rows, for ``print(estimate)``."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from graph_capture.units import format_bytes, format_us

if TYPE_CHECKING:
    from .estimate import Estimate, EstimateRow

WIDTH = 200

_HEADINGS = {
    "parameter": "params",
    "buffer": "buffers",
    "gradient": "grads",
    "optimizer_state": "optimizer",
    "input": "inputs",
    "output": "outputs",
    "activation": "activations",
    "temporary": "temporaries",
    "workspace": "scratch",
    "library_workspace": "library workspace",
}


def report(estimate: Estimate) -> str:
    """What was asked, a row for each shape, and what the figures leave out."""
    return "\n".join([*_head(estimate), *_table(estimate), *_foot(estimate)])


def dimension_notes(rows: Sequence[EstimateRow], sequence_dim: int | None) -> tuple[str, ...]:
    """What may have been meant, where no shape that a sample was resized to can be captured."""
    if sequence_dim is None or any(row.error is None or row.sequence is None for row in rows):
        return ()
    return (
        f"Dimension {sequence_dim} of the inputs was taken for the sequence: where it is none "
        "(features, say), leave out sequence_lengths (--sequence), or name the right one with "
        "sequence_dim (--sequence-dim).",
    )


def verdict(row: EstimateRow) -> str:
    """Whether the step fits, in words; empty where no budget is known."""
    if row.error is not None:
        return "cannot be captured"
    if row.fits is None:
        return ""
    if row.fits:
        return "fits"
    if row.planned is not None:
        return f"fits with a plan at +{row.planned.overhead:.1%}"
    assert row.least_budget_bytes is not None
    return f"does not fit: a plan needs {format_bytes(row.least_budget_bytes)}"


def format_rate(per_s: float) -> str:
    """A throughput with three significant digits or more.

    >>> format_rate(12_345.6), format_rate(1.234)
    ('12,346', '1.23')
    """
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _head(estimate: Estimate) -> list[str]:
    optimizer = estimate.optimizer or "no optimizer"
    autocast = f", autocast {estimate.autocast}" if estimate.autocast else ""
    lines = [
        f"Training step of {estimate.model} on {estimate.device} "
        f"({optimizer}{autocast}, torch {estimate.torch_version})"
    ]
    if estimate.budget_bytes is not None:
        headroom = (
            f", {format_bytes(estimate.headroom_bytes)} of it left as headroom"
            if estimate.headroom_bytes
            else ""
        )
        lines.append(f"  budget {format_bytes(estimate.budget_bytes)}{headroom}")
    return lines


def _table(estimate: Estimate) -> list[str]:
    rows = estimate.rows
    has_sequence = any(row.sequence is not None for row in rows)
    held = {
        category
        for row in rows
        if row.memory is not None
        for category, num_bytes in row.memory.by_category.items()
        if num_bytes
    }
    categories = [category for category in _HEADINGS if category in held]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("batch", *(["sequence"] if has_sequence else []), "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for category in categories:
        table.add_column(_HEADINGS[category], justify="right", no_wrap=True)
    for heading in ("step", "tokens/s" if has_sequence else "samples/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, categories, has_sequence))
    text = StringIO()
    Console(file=text, width=WIDTH, color_system=None, force_terminal=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]


def _cells(row: EstimateRow, categories: list[str], has_sequence: bool) -> list[str]:
    shape = [str(row.batch), *([str(row.sequence or "")] if has_sequence else [])]
    if row.memory is None:
        return [*shape, *("" for _ in ("peak", *categories, "step", "rate")), verdict(row)]
    rate = row.tokens_per_s if has_sequence else row.samples_per_s
    return [
        *shape,
        format_bytes(row.memory.total_bytes),
        *(format_bytes(row.memory.by_category.get(category, 0)) for category in categories),
        format_us(row.step_us or 0.0),
        "" if rate is None else format_rate(rate),
        verdict(row),
    ]


def _foot(estimate: Estimate) -> list[str]:
    lines = []
    for row in estimate.rows:
        if row.error is not None:
            sequence = "" if row.sequence is None else f", sequence {row.sequence}"
            lines.append(f"  batch {row.batch}{sequence}: {row.error}")
    lines += [f"  {note}" for note in estimate.notes]
    if all(row.error is not None for row in estimate.rows):  # there are no figures to explain
        return lines
    lines.append(
        f"  Memory is that of the unplanned step at its peak; times by {estimate.costs.model} for "
        f"{estimate.costs.device}."
    )
    lines += [f"  {note}" for note in estimate.costs.notes]
    if not estimate.counts_scratch:
        lines.append(
            "  Nothing ran, so scratch memory of kernels counts only where a rule says it."
        )
    if any(row.planned is not None for row in estimate.rows):
        lines.append("  Plans are those of a quick search; optimize() finds better ones.")
    return lines
