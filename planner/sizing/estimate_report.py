"""Format an estimate as a table, for ``print(estimate)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from graph_capture.costs.cost_model import CostRecord
from graph_capture.units import format_bytes, format_us

from ..plan_record import PeakMemory

ESTIMATE_FORMAT = 1

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
    "resident": "caller's own",
    "waiting": "other calls",
    "bucket": "buckets",
    "gathered": "gathered",
    "library_workspace": "library workspace",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRow:
    """A plan that was found quickly for a step that does not fit without one.

    Parameters
    ----------
    peak_bytes
        Predicted peak of the planned step.
    overhead
        Extra time over the unplanned step, as a fraction of it.
    gap
        ``(time of the step - lower bound) / lower bound``. More time for solving lowers
        overhead and gap.
    """

    peak_bytes: int
    overhead: float
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateRow:
    """A step at one batch size and sequence length.

    Parameters
    ----------
    batch, sequence
        The shape; ``sequence`` is ``None`` if the sample's own was kept.
    memory
        What the peak of the unplanned step consists of, and where it is.
    step_us
        Time of the unplanned step under the cost model.
    fits
        Whether it stays within the budget less its headroom; ``None`` without
        a budget.
    planned
        A plan that fits, for a step that does not.
    least_budget_bytes, lower_bound_bytes
        If no plan was found: the least budget known to work, and a proven lower bound
        on every budget.
    error
        Why the step cannot be captured at this shape; the figures are then ``None``.
    """

    batch: int
    sequence: int | None
    memory: PeakMemory | None = None
    step_us: float | None = None
    fits: bool | None = None
    planned: PlannedRow | None = None
    least_budget_bytes: int | None = None
    lower_bound_bytes: int | None = None
    error: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Peak of the unplanned step."""
        return None if self.memory is None else self.memory.total_bytes

    @property
    def samples_per_s(self) -> float | None:
        """Rows of the batch that unplanned steps process in one second."""
        return self.batch * 1e6 / self.step_us if self.step_us else None

    @property
    def tokens_per_s(self) -> float | None:
        """Sequence positions of these rows; ``None`` if no length was requested."""
        if self.sequence is None or self.samples_per_s is None:
            return None
        return self.sequence * self.samples_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, ready for JSON."""
        return {
            "batch": self.batch,
            "sequence": self.sequence,
            "peak_bytes": self.peak_bytes,
            "memory": None if self.memory is None else asdict(self.memory),
            "step_us": self.step_us,
            "samples_per_s": self.samples_per_s,
            "tokens_per_s": self.tokens_per_s,
            "fits": self.fits,
            "planned": None if self.planned is None else asdict(self.planned),
            "least_budget_bytes": self.least_budget_bytes,
            "lower_bound_bytes": self.lower_bound_bytes,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Memory and time of a training step at many shapes; ``str()`` is a table.

    Parameters
    ----------
    model
        Class of the model.
    device
        In words.
    device_type
        ``"cpu"`` or ``"cuda"``.
    budget_bytes, headroom_bytes
        The budget of all rows; ``None`` if none was given and the device's memory is
        not known.
    optimizer
        The optimizer whose state and step are counted, or ``None``.
    autocast
        Autocast's dtype, if one was given.
    costs
        Where the times come from.
    counts_scratch
        Whether scratch memory was measured; ``False`` if nothing ran.
    rows
        In the order of the batch sizes, one sequence length after the other.
    notes
        What readers must know besides the figures.
    """

    model: str
    device: str
    device_type: str
    budget_bytes: int | None
    headroom_bytes: int
    optimizer: str | None
    autocast: str | None
    costs: CostRecord
    counts_scratch: bool
    torch_version: str
    rows: tuple[EstimateRow, ...]
    notes: tuple[str, ...] = ()

    def row(self, batch: int, sequence: int | None = None) -> EstimateRow:
        """The row of one shape.

        Raises
        ------
        KeyError
            When it was not requested.
        """
        for row in self.rows:
            if (row.batch, row.sequence) == (batch, sequence):
                return row
        raise KeyError(f"no row for batch {batch} and sequence {sequence}")

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, ready for JSON."""
        return {
            "format": ESTIMATE_FORMAT,
            "model": self.model,
            "device": self.device,
            "device_type": self.device_type,
            "budget_bytes": self.budget_bytes,
            "headroom_bytes": self.headroom_bytes,
            "optimizer": self.optimizer,
            "autocast": self.autocast,
            "costs": asdict(self.costs),
            "counts_scratch": self.counts_scratch,
            "torch_version": self.torch_version,
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return report(self)


def report(estimate: Estimate) -> str:
    """Return the request, a row for each shape, and what the figures leave out."""
    return "\n".join([*_head(estimate), *_table(estimate), *_foot(estimate)])


def dimension_notes(rows: Sequence[EstimateRow], sequence_dim: int | None) -> tuple[str, ...]:
    """Suggest what was meant, if the step cannot be captured at any resized shape."""
    if sequence_dim is None or any(row.error is None or row.sequence is None for row in rows):
        return ()
    return (
        f"Dimension {sequence_dim} of the inputs was taken for the sequence: where it is none "
        "(features, say), leave out sequence_lengths (--sequence), or name the right one with "
        "sequence_dim (--sequence-dim).",
    )


def verdict(row: EstimateRow) -> str:
    """Say whether the step fits; empty where no budget is known."""
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
            "  Nothing ran, so scratch memory of kernels counts only where a rule gives it."
        )
    if any(row.planned is not None for row in estimate.rows):
        lines.append("  Plans are those of a quick search; optimize() finds better ones.")
    return lines
