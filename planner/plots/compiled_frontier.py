"""Measured peak against time of compiled steps: ours, PyTorch's budgets, no budget, and eager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..comparison_record import ComparisonRecord
from ..compiled_record import CompiledRecord
from .points import measured_point
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    byte_unit,
    check_suffix,
    draw_grid,
    house_style,
    new_figure,
    set_title,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MODELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPoint:
    """A compiled step in the figure.

    Parameters
    ----------
    kind
        Where it belongs.
    peak_bytes
        Measured.
    time_ratio
        Its time over that of the compiled step without a budget.
    is_wrong
        Whether its gradients are wrong.
    label
        Beside its marker.
    """

    kind: Literal["unbudgeted", "pytorch", "remat", "eager", "eager_plan"]
    peak_bytes: int
    time_ratio: float
    is_wrong: bool = False
    label: str = ""


_LOOKS: dict[str, dict[str, Any]] = {
    "remat": {"color": BLUE, "marker": "o", "linestyle": "-", "label": 'backend="remat"'},
    "pytorch": {
        "color": VERMILLION,
        "marker": "s",
        "linestyle": "--",
        "label": "activation_memory_budget",
    },
    "unbudgeted": {"color": BLACK, "marker": "D", "linestyle": "none", "label": "no budget"},
    "eager": {"color": GREY, "marker": "*", "linestyle": "none", "label": "eager, no plan"},
    "eager_plan": {"color": GREEN, "marker": "^", "linestyle": ":", "label": "eager, plans"},
}
_WRONG = {"color": BLACK, "marker": "x", "linestyle": "none", "markersize": 12, "zorder": 4}


def compiled_points(
    steps: CompiledRecord, beside: ComparisonRecord | None = None
) -> tuple[CompiledPoint, ...]:
    """Return the points of compiled steps that ran and were timed, and that of the eager step.

    Parameters
    ----------
    beside
        The comparison whose measured eager plans of ours are points, too: their times are over
        eager's, and so over the compiled step's by the ratio of these two.
    """
    found = [
        CompiledPoint(
            kind=row.kind,
            peak_bytes=row.peak_bytes,
            time_ratio=row.time_ratio,
            is_wrong=row.is_wrong,
            label="" if row.ratio is None or row.kind == "remat" else f"{row.ratio:g}",
        )
        for row in steps.rows
        if row.peak_bytes is not None and row.time_ratio is not None
    ]
    eager_ratio = steps.eager_ratio
    if not found or eager_ratio is None or steps.eager_peak_bytes is None:
        return tuple(found)
    found.append(
        CompiledPoint(kind="eager", peak_bytes=steps.eager_peak_bytes, time_ratio=1 / eager_ratio)
    )
    rows = [] if beside is None else [r for r in beside.rows if r.strategy == beside.ours]
    plans = {point for row in rows if (point := measured_point(row)) is not None}
    found += [
        CompiledPoint(
            kind="eager_plan",
            peak_bytes=plan.peak_bytes,
            time_ratio=(1 + plan.overhead) / eager_ratio,
        )
        for plan in sorted(plans, key=lambda p: p.peak_bytes)
    ]
    return tuple(found)


def plot_compiled(
    models: Mapping[str, Sequence[CompiledPoint]],
    path: str | Path | None = None,
    *,
    title: str = "Compiled training steps: measured peak against time",
) -> Figure:
    """Draw the measured peak of compiled steps against their time, a panel for each model.

    Points whose gradients are wrong are crossed out. A line joins the points of one kind by
    their peaks.

    Parameters
    ----------
    models
        Points by the model's name.
    path
        ``.png`` or ``.svg``; written when given.
    title
        Should name device, dtype, and how busy the machine was.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    ValueError
        When there is nothing to draw, too many models, or the path has another suffix.
    """
    check_suffix(path)
    models = {name: points for name, points in models.items() if points}
    if not models:
        raise ValueError("there is no compiled step to draw: none was timed")
    if len(models) > MOST_MODELS:
        raise ValueError(f"{len(models)} models do not fit; give {MOST_MODELS} at most")
    with house_style():
        figure = new_figure(4.2)
        axes = figure.subplots(1, len(models), squeeze=False)[0]
        shown: dict[str, Any] = {}
        for axis, (name, points) in zip(axes, models.items(), strict=True):
            _draw(axis, points, shown)
            axis.set_title(name)
            draw_grid(axis)
        axes[0].set_ylabel("time / compiled without a budget")
        columns = 4 if len(shown) <= 4 else 3
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns)
        set_title(figure, title)
        write_figure(figure, path)
    return figure


def _draw(axis: Any, points: Sequence[CompiledPoint], shown: dict[str, Any]) -> None:
    unit_bytes, unit = byte_unit(max(point.peak_bytes for point in points))
    for kind, look in _LOOKS.items():
        own = sorted((p for p in points if p.kind == kind), key=lambda p: p.peak_bytes)
        if not own:
            continue
        xs = [point.peak_bytes / unit_bytes for point in own]
        (line,) = axis.plot(xs, [point.time_ratio for point in own], markersize=6, **look)
        shown[str(look["label"])] = line
        for x, point in zip(xs, own, strict=True):
            axis.annotate(
                point.label,
                (x, point.time_ratio),
                xytext=(4, 6),
                textcoords="offset points",
                color=look["color"],
            )
    wrong = [p for p in points if p.is_wrong]
    if wrong:
        xs = [point.peak_bytes / unit_bytes for point in wrong]
        (line,) = axis.plot(xs, [point.time_ratio for point in wrong], **_WRONG)
        shown["wrong gradients"] = line
    axis.set_xlabel(f"measured peak, {unit}")


__all__ = ["MOST_MODELS", "CompiledPoint", "compiled_points", "plot_compiled"]
