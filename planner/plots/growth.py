"""Peak and overhead against depth: how memory grows with the number of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .style import (
    COLOURS,
    LINES,
    MARKERS,
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

Depths = Sequence[tuple[int, int, float]]
"""Number of layers, peak in bytes, overhead as a fraction."""


def plot_growth(
    strategies: Mapping[str, Depths],
    path: str | Path | None = None,
    *,
    title: str = "Memory against depth",
    subtract_bytes: Mapping[int, int] | None = None,
) -> Figure:
    """Draw peak memory (both axes logarithmic) and overhead against the number of layers.

    After each strategy's name is the power of the number of layers that its peaks
    follow, fitted to the upper half of its depths.

    Parameters
    ----------
    strategies
        By name, for each depth: layers, peak in bytes, overhead as a fraction. Values
        that are not finite or not positive are left out.
    path
        ``.png`` or ``.svg``; written when given.
    title
        Title of the figure; should name model, device and dtype.
    subtract_bytes
        By number of layers, memory that grows with depth regardless of recomputation
        (parameters, gradients, optimizer state); subtracted from the peaks.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    ValueError
        When there is nothing to draw, too many strategies, or the path has
        another suffix.
    """
    check_suffix(path)
    off = subtract_bytes or {}
    series = {
        name: sorted(
            (layers, peak_bytes - off.get(layers, 0), overhead)
            for layers, peak_bytes, overhead in depths
            if layers > 0 and peak_bytes > off.get(layers, 0) and math.isfinite(overhead)
        )
        for name, depths in strategies.items()
    }
    series = {name: depths for name, depths in series.items() if depths}
    if not series:
        raise ValueError("there is no depth to draw: no strategy has a peak and an overhead")
    if len(series) > len(COLOURS):
        raise ValueError(
            f"{len(series)} strategies cannot be told apart; give {len(COLOURS)} at most"
        )
    with house_style():
        figure = new_figure(4.2)
        left, right = figure.subplots(1, 2)
        unit_bytes, unit = byte_unit(max(p for depths in series.values() for _, p, _ in depths))
        for i, (name, depths) in enumerate(series.items()):
            look = {
                "color": COLOURS[i],
                "marker": MARKERS[i],
                "linestyle": LINES[i % len(LINES)],
                "markersize": 5.5,
            }
            layers = [x for x, _, _ in depths]
            power = fitted_power(depths)
            label = name if power is None else f"{name}: layers^{power:.2f}"
            left.plot(layers, [y / unit_bytes for _, y, _ in depths], label=label, **look)
            right.plot(layers, [100 * y for _, _, y in depths], label=name, **look)
        left.set_xscale("log", base=2)
        left.set_yscale("log", base=2)
        right.set_xscale("log", base=2)
        for axis in (left, right):
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.set_xlabel("layers")
            draw_grid(axis)
        left.yaxis.set_major_formatter("{x:g}")
        left.set_ylabel(f"peak memory{' without model' if off else ''}, {unit}")
        right.set_ylabel("extra time, %")
        right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(series))
        )
        set_title(figure, title)
        write_figure(figure, path)
    return figure


def fitted_power(depths: Depths) -> float | None:
    """The p of peak = c · layers^p by least squares on the upper half of the depths.

    ``None`` with fewer than two different depths there. The lower half is left out,
    because memory that does not grow matters most in it.

    >>> fitted_power([(1, 10, 0.0), (4, 20, 0.0), (16, 40, 0.0), (64, 80, 0.0)])
    0.5
    """
    upper = sorted(depths)[len(depths) // 2 :] if len(depths) > 3 else sorted(depths)
    layers = np.log([x for x, _, _ in upper])
    if len(set(layers)) < 2:
        return None
    peaks = np.log([y for _, y, _ in upper])
    return round(float(np.polyfit(layers, peaks, 1)[0]), 6)
