"""Cells as Markdown: budgets of ours, each beside a ratio of PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence

from graph_capture.units import format_bytes

from .cell import Cell

HEAD = (
    "| model | our budget | predicted, bytes | measured, bytes | gradients | estimated time | "
    "gap | PyTorch's ratio | its peak, bytes | its gradients |\n|" + "---|" * 10
)

TIMES_HEAD = (
    "| model | asked for | measured, bytes | estimated time | time / no budget |\n|" + "---|" * 5
)


def table(cells: Sequence[Cell], unbudgeted_bytes: int) -> list[str]:
    """Rows of one model, the highest budget and ratio first."""
    ours = [c for c in cells if c.is_ours and not c.for_times]
    ours.sort(key=lambda c: -(c.budget_bytes or 0))
    theirs = [c for c in cells if c.ratio is not None and not c.is_ours]
    theirs.sort(key=lambda c: -(c.ratio or 0.0))
    rows = []
    for i in range(max(len(ours), len(theirs))):
        left = _ours(ours[i], unbudgeted_bytes) if i < len(ours) else " | " * 5
        right = _theirs(theirs[i]) if i < len(theirs) else " | "
        rows.append(f"| {cells[0].model} | {left} | {right} |")
    return rows


def times_table(cells: Sequence[Cell]) -> list[str]:
    """Rows of one model whose time was measured."""
    return [
        f"| {c.model} | {c.asked} | {c.peak_bytes:,} | "
        f"{'' if c.overhead is None else f'+{c.overhead:.1%}'} | {c.time_ratio:.3f} |"
        for c in cells
        if c.time_ratio is not None
    ]


def _ours(cell: Cell, unbudgeted_bytes: int) -> str:
    assert cell.budget_bytes is not None
    share = f"{cell.budget_bytes / unbudgeted_bytes:.0%}, {format_bytes(cell.budget_bytes)}"
    if cell.failure:
        return f"{share} | | | {cell.failure} | |"
    return (
        f"{share} | {cell.predicted_bytes:,} | {cell.peak_bytes:,} | {gradients_text(cell)} | "
        f"+{cell.overhead:.1%} | {cell.gap:.2%}"
    )


def _theirs(cell: Cell) -> str:
    return f"{cell.ratio:.2f} | {cell.peak_bytes:,} | {gradients_text(cell)}"


def gradients_text(cell: Cell) -> str:
    """What gradients are like, in words."""
    if cell.bits_equal:
        return "equal to the bit"
    if cell.is_right and cell.slope_error is not None:
        return f"right for other masks, slopes within {cell.slope_error:.0%}"
    if cell.is_right:
        return f"right, {cell.float64_error:.0e} from float64"
    return f"**wrong**, error {cell.error:.2g}"


__all__ = ["HEAD", "TIMES_HEAD", "gradients_text", "table", "times_table"]
