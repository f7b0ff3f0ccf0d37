"""Cells whose times were measured, as a figure: peak against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from planner.plots import plot_compiled
from planner.plots.compiled_frontier import CompiledPoint

from .cell import Cell, Cells

TITLE = (
    "Compiled training steps within budgets: measured peak against time\n"
    "{size} models, float32, {lower} on the CPU, torch {torch}, one thread"
)


def draw_times(cells: Cells, models: Sequence[str], path: Path) -> None:
    """Draw the timed cells of some models, without those of ours that had no limit."""
    series = {name: [_point(c) for c in cells if _is_shown(c, name)] for name in models}
    settings = cells.settings
    title = TITLE.format(
        size=settings["size"], lower=settings["lower"], torch=settings["versions"]["torch"]
    )
    plot_compiled({name: found for name, found in series.items() if found}, path, title=title)


def _is_shown(cell: Cell, model: str) -> bool:
    if cell.model != model or cell.time_ratio is None or cell.peak_bytes is None:
        return False
    return not cell.is_ours or bool(cell.num_recomputed)


def _point(cell: Cell) -> CompiledPoint:
    assert cell.peak_bytes is not None
    assert cell.time_ratio is not None
    kind: Literal["remat", "pytorch", "unbudgeted"] = "unbudgeted"
    if cell.is_ours:
        kind = "remat"
    elif cell.ratio is not None:
        kind = "pytorch"
    return CompiledPoint(
        kind=kind,
        peak_bytes=cell.peak_bytes,
        time_ratio=cell.time_ratio,
        is_wrong=not cell.is_right,
        label=f"{cell.ratio:.2g}" if kind == "pytorch" else "",
    )


__all__ = ["draw_times"]
