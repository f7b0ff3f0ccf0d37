"""Draw measured against predicted figures, to show how reliable predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comparison_record import ComparisonRecord, ComparisonRow
from .points import Point, measured_point, predicted_point
from .style import (
    BLUE,
    GREY,
    ORANGE,
    PALE,
    byte_unit,
    check_suffix,
    draw_grid,
    house_style,
    new_figure,
    set_title,
    write_figure,
)
from .titles import title_of_comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEAK_BAND = 0.01
OVERHEAD_BAND = 0.03


def plot_predicted(comparison: ComparisonRecord, path: str | Path | None = None) -> Figure:
    """Draw measured peaks and overheads against the predicted ones, one point per row.

    The panels below show the differences. The bands are 1 % of the peak and 3 points of
    overhead; vertical bars are the quartiles of the measurement.

    Parameters
    ----------
    path
        ``.png`` or ``.svg``; written when given.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    ValueError
        When no row has both figures, or the path has another suffix.
    """
    check_suffix(path)
    series = _series(comparison)
    if not series:
        raise ValueError(
            f"none of {len(comparison.rows)} rows has both a prediction and a measurement; "
            "compare with measuring switched on"
        )
    with house_style():
        figure = new_figure(5.4)
        axes = figure.subplots(2, 2, sharex="col", height_ratios=(2.2, 1))
        _peaks(axes[0, 0], axes[1, 0], series)
        _overheads(axes[0, 1], axes[1, 1], series)
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3)
        what = "measured against predicted"
        set_title(figure, title_of_comparison(what, comparison, measured=True))
        write_figure(figure, path)
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """Rows drawn in the same style.

    Parameters
    ----------
    peaks
        Predicted and measured, in bytes, each pair once.
    overheads
        Likewise, for the timed rows.
    """

    label: str
    colour: str
    marker: str
    peaks: list[tuple[int, int]]
    overheads: list[tuple[float, Point]]


def _series(comparison: ComparisonRecord) -> list[_Series]:
    """The other strategies, and ours on top of them; without those that have no pairs."""
    looks = (("other strategies", ORANGE, "s"), (f"{comparison.ours} (ours)", BLUE, "o"))
    series = []
    for is_ours, (label, colour, marker) in enumerate(looks):
        rows = [r for r in comparison.rows if (r.strategy == comparison.ours) == bool(is_ours)]
        own = _Series(
            label=label,
            colour=colour,
            marker=marker,
            peaks=list(dict.fromkeys(pair for row in rows for pair in _peak_pairs(row))),
            overheads=list(dict.fromkeys(pair for row in rows for pair in _overhead_pairs(row))),
        )
        if own.peaks:
            series.append(own)
    return series


def _peak_pairs(row: ComparisonRow) -> list[tuple[int, int]]:
    if row.measured is None or row.predicted_peak_bytes is None:
        return []
    return [(row.predicted_peak_bytes, row.measured.peak_bytes)]


def _overhead_pairs(row: ComparisonRow) -> list[tuple[float, Point]]:
    predicted, measured = predicted_point(row), measured_point(row)
    if predicted is None or measured is None:
        return []
    return [(predicted.overhead, measured)]


def _peaks(axis: Any, below: Any, series: list[_Series]) -> None:
    both = [peak_bytes for entry in series for pair in entry.peaks for peak_bytes in pair]
    unit_bytes, unit = byte_unit(max(both))
    ends = _ends([peak_bytes / unit_bytes for peak_bytes in both])
    factors = (1 - PEAK_BAND, 1 + PEAK_BAND)
    _band(axis, ends, *([factor * x for x in ends] for factor in factors))
    _band(below, ends, [-100 * PEAK_BAND] * 2, [100 * PEAK_BAND] * 2)
    for entry in series:
        x = [predicted / unit_bytes for predicted, _ in entry.peaks]
        y = [measured / unit_bytes for _, measured in entry.peaks]
        _mark(axis, x, y, entry)
        _mark(below, x, [100 * (b / a - 1) if a else 0.0 for a, b in zip(x, y)], entry)
    _finish(axis, below, ends, "peak", unit, "difference, %")


def _overheads(axis: Any, below: Any, series: list[_Series]) -> None:
    every = [pair for entry in series for pair in entry.overheads]
    if not every:
        axis.set_title("times were not measured", fontsize=9)
        axis.axis("off")
        below.axis("off")
        return
    ends = _ends([100 * x for predicted, measured in every for x in (predicted, measured.overhead)])
    shifts = (-100 * OVERHEAD_BAND, 100 * OVERHEAD_BAND)
    _band(axis, ends, *([x + shift for x in ends] for shift in shifts))
    _band(below, ends, *([shift] * 2 for shift in shifts))
    for entry in series:
        x = [100 * predicted for predicted, _ in entry.overheads]
        y = [100 * measured.overhead for _, measured in entry.overheads]
        low = [100 * measured.quartiles[0] for _, measured in entry.overheads]
        high = [100 * measured.quartiles[1] for _, measured in entry.overheads]
        axis.vlines(x, low, high, color=entry.colour, linewidth=1)
        below.vlines(
            x,
            [b - a for a, b in zip(x, low)],
            [b - a for a, b in zip(x, high)],
            color=entry.colour,
            linewidth=1,
        )
        _mark(axis, x, y, entry)
        _mark(below, x, [b - a for a, b in zip(x, y)], entry)
    _finish(axis, below, ends, "extra time", "%", "difference, points")


def _band(axis: Any, ends: list[float], low: list[float], high: list[float]) -> None:
    axis.fill_between(
        ends, low, high, color=PALE, linewidth=0, label="±1 % of the peak, ±3 points of extra time"
    )
    middle = [(a + b) / 2 for a, b in zip(low, high)]
    axis.plot(ends, middle, color=GREY, linewidth=1)


def _mark(axis: Any, x: list[float], y: list[float], entry: _Series) -> None:
    axis.plot(
        x,
        y,
        marker=entry.marker,
        color=entry.colour,
        linestyle="none",
        markersize=6,
        label=entry.label,
    )


def _ends(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    slack = 0.06 * ((high - low) or abs(high) or 1.0)
    return [low - slack, high + slack]


def _finish(axis: Any, below: Any, ends: list[float], what: str, unit: str, apart: str) -> None:
    axis.set_xlim(*ends)
    axis.set_ylim(*ends)
    axis.set_ylabel(f"measured {what}, {unit}")
    below.set_xlabel(f"predicted {what}, {unit}")
    below.set_ylabel(apart)
    draw_grid(axis)
    draw_grid(below)
