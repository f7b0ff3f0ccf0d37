"""Results as tables: the same rows for the terminal and for markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from graph_capture.units import format_bytes

from .environment import lines
from .results import Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A titled table and what it shows."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, caption=self.note, caption_justify="left")
        for name in self.columns:
            table.add_column(name, overflow="fold")
        for i, row in enumerate(self.rows):
            ends = i + 1 == len(self.rows) or self.rows[i + 1][0] != row[0]
            table.add_row(*row, end_section=ends)
        return table

    def markdown(self) -> str:
        """For a document."""
        cells = [self.columns, ("---",) * len(self.columns), *self.rows]
        text = "\n".join("| " + " | ".join(c.replace("|", "/") for c in r) + " |" for r in cells)
        return f"### {self.title}\n\n{self.note}\n\n{text}\n"


def sections(results: Results) -> list[Section]:
    """One for each check that has run."""
    made = [_bits(results), _memory(results), _overhead(results), _peers(results)]
    made.append(_portable(results))
    return [section for section in made if section.rows]


def markdown(results: Results) -> str:
    """The whole report."""
    owed = results.environment["owed"]
    parts = [f"**{owed}**\n"] if owed else []
    parts += ["\n".join(f"- {line}" for line in lines(results.environment)) + "\n"]
    parts += ["\n".join(f"- {name}: {text}" for name, text in results.subjects.items()) + "\n"]
    parts += [section.markdown() for section in sections(results)]
    parts += [headroom_line(results) + "\n"]
    faults = results.faults()
    if faults:
        parts.append("### Faults\n\n" + "\n".join(f"- {fault}" for fault in faults) + "\n")
    return "\n".join(parts)


def headroom_line(results: Results) -> str:
    """What the worst fragmentation says about the default headroom."""
    if results.headroom is None:
        return "Headroom: the CPU's allocator holds nothing back, so it is owed by a GPU."
    return (
        f"Headroom: the worst fragmentation of a planned step was {results.headroom:.1%} "
        "(reserved over allocated)."
    )


def _bits(results: Results) -> Section:
    return Section(
        title="Bits",
        note="Loss, outputs, gradients, buffers and generators against eager's, step by step, each "
        "with a seed and an input of its own.",
        columns=("model", "budget", "steps", "algorithms", "eager and itself", "planned and eager"),
        rows=tuple(
            (
                row.model,
                _where(row.where, row.budget_bytes),
                str(row.num_steps),
                row.algorithms,
                _brief(row.eager_differs) if row.eager_differs else "equal",
                "not comparable"
                if row.planned_differs is None
                else (_brief(row.planned_differs) or "equal"),
            )
            for row in results.bits
        ),
    )


def _memory(results: Results) -> Section:
    return Section(
        title="Peak memory",
        note="The whole step, optimizer included. Error: predicted over measured, less one. "
        "Fragmentation: reserved over allocated, less one.",
        columns=(
            "model",
            "budget",
            "predicted",
            "measured",
            "error",
            "within",
            "reserved",
            "fragmentation",
            "overhead by roofline, gap",
        ),
        rows=tuple(
            (row.model, _where(row.where, row.budget_bytes), row.infeasible, *[""] * 6)
            if row.infeasible
            else (
                row.model,
                _where(row.where, row.budget_bytes),
                format_bytes(row.predicted_bytes),
                format_bytes(row.measured_bytes),
                f"{row.error:+.3%}",
                "–" if row.budget_bytes is None else "yes" if row.within else "NO",
                "–" if row.reserved_bytes is None else format_bytes(row.reserved_bytes),
                _percent(row.fragmentation),
                "–" if row.budget_bytes is None else f"{row.overhead:.1%}, {row.gap:.2%}",
            )
            for row in results.memory
        ),
    )


def _overhead(results: Results) -> Section:
    models = sorted({name for row in results.overhead for name in row.predicted}, reverse=True)
    return Section(
        title="Overhead",
        note="Of the step without its optimizer. Measured: median of paired runs (quartiles).",
        columns=(
            "model",
            "budget",
            "planned by",
            *(f"by {name}" for name in models),
            "measured",
            *(f"step by {name}" for name in models),
            "step measured",
        ),
        rows=tuple(
            (
                row.model,
                _where(row.where, row.budget_bytes),
                row.planned_by,
                *(_percent(row.predicted.get(name)) for name in models),
                row.infeasible
                or f"{row.measured:.1%} ({row.quartiles[0]:.1%} to {row.quartiles[1]:.1%}, "
                f"{row.num_pairs} pairs)",
                *(_ms(row.predicted_step_us.get(name)) for name in models),
                _ms(row.eager_us),
            )
            for row in results.overhead
        ),
    )


def _peers(results: Results) -> Section:
    return Section(
        title="Beside what people use",
        note="Peak of the whole step; time over eager's without the optimizer; gradients of a "
        "first step against eager's.",
        columns=(
            "model",
            "method",
            "peak",
            "of eager's",
            "time / eager",
            "predicted",
            "time / checkpointing",
            "gradients",
            "buffers",
        ),
        rows=tuple(
            (row.model, row.method, f"failed: {row.error}", *[""] * 6)
            if row.error
            else (
                row.model,
                row.method,
                format_bytes(row.peak_bytes),
                f"{row.peak_bytes / _eager_peak(results, row.model):.2f}",
                f"{row.ratio:.2f} ({row.quartiles[0]:.2f} to {row.quartiles[1]:.2f})",
                _ratio(row.predicted_ratio),
                _ratio(row.ratio_to_checkpointing),
                row.gradients
                if row.gradients == "equal"
                else f"{row.gradients} ({row.gradient_error:.1e})",
                row.buffers or "–",
            )
            for row in results.peers
        ),
    )


def _portable(results: Results) -> Section:
    return Section(
        title="Planned elsewhere",
        note="A plan made on stand-ins for the device, through JSON, and one made on the device.",
        columns=("model", "device", "fingerprints", "applies", "peak from afar", "peak on it"),
        rows=tuple(
            (
                row.model,
                row.entry,
                "equal"
                if row.without_device == row.here
                else f"{row.without_device[:8]} and {row.here[:8]}",
                _brief(row.refused) if row.refused else "yes",
                format_bytes(row.without_device_peak_bytes),
                format_bytes(row.here_peak_bytes),
            )
            for row in results.portable
        ),
    )


def _eager_peak(results: Results, model: str) -> int:
    peaks = (r.peak_bytes for r in results.peers if r.model == model and r.method == "eager")
    return next(peaks)


def _where(where: float | str, budget_bytes: int | None) -> str:
    if budget_bytes is None:
        return str(where)
    share = where if isinstance(where, str) else f"{where:.0%}"
    return f"{share}: {format_bytes(budget_bytes)}"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ms(value_us: float | None) -> str:
    return "–" if value_us is None or math.isnan(value_us) else f"{value_us / 1e3:.1f} ms"


def _brief(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
