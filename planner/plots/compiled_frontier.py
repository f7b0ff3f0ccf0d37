"""Measured peak against time of compiled steps: ours, PyTorch's budgets, and no budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .style import (
    BLACK,
    BLUE,
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

    kind: Literal["unbudgeted", "pytorch", "remat"]
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
}
_WRONG = {"color": BLACK, "marker": "x", "linestyle": "none", "markersize": 12, "zorder": 4}


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
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
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


__all__ = ["MOST_MODELS", "CompiledPoint", "plot_compiled"]
