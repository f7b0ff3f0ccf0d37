"""Draw what a plan saves and recomputes, by layer, as a coloured table of operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graph_capture.cost_graph import CostGraph
from solvers.schedule import Schedule

from ..plan_record import PlanRecord
from .layer_table import AFTER, BEFORE, Fate, LayerTable, layer_table
from .style import (
    BLUE,
    GREEN,
    ORANGE,
    PALE,
    VERMILLION,
    byte_unit,
    check_suffix,
    house_style,
    new_figure,
    set_title,
    write_figure,
)
from .titles import title_of_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL_SHARE = 0.002
"""Rows that hold less than this share of all bytes saved and recomputed are left out."""
MOST_TICKS = 32
LAYER_CHARACTERS, END_CHARACTERS = 50, 65
"""Characters that fit below the columns side by side; labels at the ends may stick out a little."""
ROW_INCHES = 0.2

_LOOKS: Mapping[Fate, tuple[str, str, str]] = {  # words, colour, mark
    Fate.SAVED: ("saved", BLUE, ""),
    Fate.RECOMPUTED: ("recomputed", ORANGE, "o"),
    Fate.REPEATED: ("recomputed twice or more", VERMILLION, "X"),
    Fate.BOTH: ("saved, later recomputed", GREEN, "D"),
    Fate.NOT_NEEDED: ("gone after the forward pass, runs once", PALE, ""),
}


def plot_layers(
    plan: PlanRecord | tuple[CostGraph, Schedule],
    path: str | Path | None = None,
    *,
    title: str = "",
    small: bool = False,
) -> Figure:
    """Draw which forward operators are saved or recomputed, kinds of operators by layers.

    The bars give the bytes: of a kind in all layers (right), and of a layer (above).

    Parameters
    ----------
    plan
        A plan, or a graph and a schedule.
    path
        ``.png`` or ``.svg``; written when given.
    title
        What the figure shows, for example model and batch.
    small
        Also draw kinds with almost no bytes (under 0.2 %), and those that are neither
        saved nor recomputed anywhere.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    ValueError
        When there is nothing to draw, or the path has another suffix.
    """
    check_suffix(path)
    graph, schedule = plan if isinstance(plan, tuple) else (plan.graph, plan.schedule)
    whole = layer_table(graph, schedule)
    table = whole if small else whole.without(_says_little(whole))
    if not table.rows:
        raise ValueError(
            f"none of {len(whole.rows)} kinds of operators is saved or recomputed; "
            "small=True draws them all"
        )
    with house_style():
        figure = new_figure(2.1 + ROW_INCHES * len(table.rows))
        _draw(figure, table, len(whole.rows) - len(table.rows))
        known = [] if isinstance(plan, tuple) else [plan]
        set_title(figure, title_of_plan(title or "What is saved, what is recomputed", known))
        write_figure(figure, path)
    return figure


def _says_little(table: LayerTable) -> Any:
    held = (table.saved_bytes + table.recomputed_bytes).sum(axis=1)
    idle = np.isin(table.fates, [Fate.ABSENT, Fate.NOT_NEEDED]).all(axis=1)
    return idle | (held < SMALL_SHARE * held.sum())


def _draw(figure: Figure, table: LayerTable, num_left_out: int) -> None:
    above, right = table.saved_bytes.sum(axis=0), table.saved_bytes.sum(axis=1)
    above_again, right_again = (
        table.recomputed_bytes.sum(axis=0),
        table.recomputed_bytes.sum(axis=1),
    )
    num_rows, num_columns = table.fates.shape
    axes = figure.subplots(
        2,
        2,
        sharex="col",
        sharey="row",
        width_ratios=(3.2, 1),
        height_ratios=(0.8, ROW_INCHES * num_rows),
    )
    top, corner, cells, side = axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]
    corner.axis("off")
    _cells(cells, table)
    cells.set_yticks(range(num_rows), [str(row) for row in table.rows])
    labels, prefix = column_labels(table.columns)
    every = -(-num_columns // MOST_TICKS)
    ticks = list(range(0, num_columns, every))
    cells.set_xticks(ticks, [labels[c] for c in ticks])
    _turn(cells.get_xticklabels(), num_columns)
    cells.set_xlabel(f"layers: {prefix}" if prefix else "layers")
    cells.tick_params(length=0)
    for spine in cells.spines.values():
        spine.set_visible(False)

    unit_bytes, unit = byte_unit(max((above + above_again).max(), 1))
    where = np.arange(num_columns)
    top.bar(where, above / unit_bytes, color=BLUE, width=0.7)
    top.bar(where, above_again / unit_bytes, bottom=above / unit_bytes, width=0.7, **_again())
    top.set_ylabel(unit)
    top.tick_params(axis="x", length=0, labelbottom=False)
    top.tick_params(axis="y", labelleft=True)

    unit_bytes, unit = byte_unit(max((right + right_again).max(), 1))
    where = np.arange(num_rows)
    side.barh(where, right / unit_bytes, color=BLUE, height=0.7)
    side.barh(where, right_again / unit_bytes, left=right / unit_bytes, height=0.7, **_again())
    side.set_xlabel(f"{unit} in all layers")
    side.tick_params(axis="y", length=0, labelleft=False)
    _legend(figure, table, num_left_out)


def _again() -> dict[str, Any]:
    return {"color": ORANGE, "hatch": "////", "edgecolor": "white", "linewidth": 0}


def _cells(axis: Any, table: LayerTable) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    for fate, (words, colour, mark) in _LOOKS.items():
        rows, columns = np.nonzero(table.fates == fate)
        if not len(rows):
            continue
        boxes = [Rectangle((c - 0.46, r - 0.42), 0.92, 0.84) for r, c in zip(rows, columns)]
        axis.add_collection(PatchCollection(boxes, facecolor=colour, edgecolor="none", label=words))
        if mark:
            axis.scatter(columns, rows, marker=mark, s=16, color="white", linewidths=0, zorder=3)
    num_rows, num_columns = table.fates.shape
    axis.set_xlim(-0.5, num_columns - 0.5)
    axis.set_ylim(num_rows - 0.5, -0.5)


def _turn(labels: Sequence[Any], num_columns: int) -> None:
    """Rotate labels that are wider than their columns: all of them, or both ends."""
    ends = [text for text in labels if text.get_text() in (BEFORE, AFTER)]
    layers = [text for text in labels if text not in ends]
    crowded = any(len(text.get_text()) > LAYER_CHARACTERS // num_columns for text in layers)
    for text in labels if crowded else ends:
        if crowded or len(text.get_text()) > END_CHARACTERS // num_columns:
            text.set_rotation(90)


def column_labels(columns: Sequence[str]) -> tuple[list[str], str]:
    """Names of layers without their common prefix, and the prefix.

    >>> column_labels(["before", "transformer.h.0", "transformer.h.1", "after"])
    (['before', '0', '1', 'after'], 'transformer.h')
    """
    layers = [c for c in columns if c not in (BEFORE, AFTER)]
    shared: list[str] = []
    for parts in zip(*(layer.split(".")[:-1] for layer in layers)):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    common = ".".join(shared) if len(layers) > 1 else ""
    cut = len(common) + 1 if common else 0
    return [c if c in (BEFORE, AFTER) else c[cut:] for c in columns], common


def _legend(figure: Figure, table: LayerTable, num_left_out: int) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for fate, (words, colour, mark) in _LOOKS.items():
        if (table.fates == fate).any():
            box = Line2D([], [], marker="s", markersize=10, color=colour, linestyle="none")
            dot = Line2D([], [], marker=mark or "None", markersize=4, color="white", linestyle="")
            handles.append(((box, dot), words))
    title = f"{num_left_out} kinds of operators with next to no bytes are not shown"
    figure.legend(
        [handle for handle, _ in handles],
        [words for _, words in handles],
        loc="outside lower center",
        ncols=2 if len(handles) in (2, 4) else 3,
        title=title if num_left_out else None,
        title_fontsize=9,
    )
