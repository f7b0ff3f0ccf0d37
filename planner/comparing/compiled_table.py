"""Format compiled steps: as Markdown, and as a part of a comparison's table."""

from __future__ import annotations

from collections.abc import Iterator

from graph_capture.units import format_bytes

from ..compiled_record import CompiledRecord, CompiledRow

_HEADS = (
    "step",
    "budget",
    "predicted, bytes",
    "measured, bytes",
    "gradients",
    "time / no budget",
    "estimated extra time, least, gap",
    "first step, s",
)
_LONGEST_FAILURE = 90


def markdown(steps: CompiledRecord) -> str:
    """A table in Markdown, with a line about the eager step above it."""
    lines = [f"compiled steps of {steps.name} by {steps.lower}"]
    if (beside := _beside_eager(steps)) is not None:
        lines.append(f"{beside}\n")
    lines += [" | ".join(("", *_HEADS, "")).strip(), "|---" * len(_HEADS) + "|"]
    rows = (_cells(row, "**wrong**, error {}") for row in steps.rows)
    return "\n".join([*lines, *(" | ".join(("", *cells, "")).strip() for cells in rows)])


def compiled_lines(steps: CompiledRecord) -> Iterator[str]:
    """The lines about compiled steps in a comparison's table."""
    yield f"compiled steps, by {steps.lower}: model and loss as one graph"
    if (beside := _beside_eager(steps)) is not None:
        yield f"  {beside}"
    yield (
        "  peaks are of whole steps; times and gradients are against the compiled step without a "
        "budget, whose own"
    )
    yield "  row is beside itself; ours has the peak that PyTorch's ratio came to as its budget"
    table: list[tuple[str, ...]] = [(" ", *_HEADS)]
    for row in steps.rows:
        cells = tuple(_cells(row, "WRONG, error {}"))
        table.append(("*" if row.kind == "remat" else " ", *cells))
    failed = [row.peak_bytes is None for row in steps.rows]
    measured = 1 + _HEADS.index("measured, bytes")
    shown = [table[0], *(cells for cells, no in zip(table[1:], failed, strict=True) if not no)]
    widths = [max(len(cells[i]) for cells in shown) for i in range(len(table[0]))]
    widths[1] = max(len(cells[1]) for cells in table)
    for cells, no in zip(table, (False, *failed), strict=True):
        parts = [cells[0], cells[1].ljust(widths[1])]
        until = measured if no else len(cells)
        parts += [c.rjust(n) for c, n in zip(cells[2:until], widths[2:until], strict=True)]
        if no:
            parts.append(f"failed: {cells[measured]:.{_LONGEST_FAILURE}}")
        yield "  ".join(parts)


def _beside_eager(steps: CompiledRecord) -> str | None:
    if steps.eager_peak_bytes is None:
        return None
    text = f"the same step in eager: {steps.eager_peak_bytes:,} bytes"
    if steps.eager_ratio is not None:
        text += f"; compiled without a budget, it takes {steps.eager_ratio:.2f} of eager's time"
    return text


def _cells(row: CompiledRow, wrong: str) -> Iterator[str]:
    yield name_of_row(row)
    yield "" if row.budget_bytes is None else format_bytes(row.budget_bytes)
    yield "" if row.predicted_bytes is None else f"{row.predicted_bytes:,}"
    over = " OVER BUDGET" * row.is_over_budget
    yield f"{row.peak_bytes:,}{over}" if row.peak_bytes is not None else row.failure
    if row.peak_bytes is None:
        yield ""
    elif row.is_wrong:
        yield wrong.format("not finite" if row.error is None else f"{row.error:.2g}")
    else:
        yield "equal to the bit" if row.bits_equal else f"error {row.error:.1e}"
    yield "" if row.time_ratio is None else f"{row.time_ratio:.2f}"
    if row.overhead is None:
        yield ""
    else:
        yield f"+{row.overhead:.1%}, +{row.least_overhead or 0:.1%}, {row.gap or 0:.2%}"
    yield "" if row.first_step_s is None else f"{row.first_step_s:.0f}"


def name_of_row(row: CompiledRow) -> str:
    """What a compiled step is, in words."""
    return {
        "unbudgeted": "no budget",
        "pytorch": f"PyTorch's {row.ratio}",
        "remat": f"ours, at the peak of {row.ratio}",
    }[row.kind]


__all__ = ["compiled_lines", "markdown", "name_of_row"]
