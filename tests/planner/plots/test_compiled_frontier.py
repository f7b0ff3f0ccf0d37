"""The figure of compiled steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.plots import plot_compiled
from planner.plots.compiled_frontier import CompiledPoint

MB = 10**6
POINTS = (
    CompiledPoint(kind="unbudgeted", peak_bytes=10 * MB, time_ratio=1.0),
    CompiledPoint(kind="pytorch", peak_bytes=9 * MB, time_ratio=1.1, is_wrong=True, label="0.3"),
    CompiledPoint(kind="pytorch", peak_bytes=8 * MB, time_ratio=1.2, label="0.6"),
    CompiledPoint(kind="remat", peak_bytes=7 * MB, time_ratio=1.05),
    CompiledPoint(kind="remat", peak_bytes=9 * MB, time_ratio=1.01),
)


def test_points_lie_where_they_were_measured() -> None:
    """Each kind's line goes by rising peaks; ratios stand beside their markers."""
    figure = plot_compiled({"bert": POINTS})
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    ours, theirs = lines['backend="remat"'], lines["activation_memory_budget"]
    assert list(ours.get_xdata()) == [7, 9]
    assert list(ours.get_ydata()) == [1.05, 1.01]
    assert list(theirs.get_xdata()) == [8, 9]
    assert {text.get_text() for text in axis.texts} >= {"0.3", "0.6"}
    assert axis.get_xlabel() == "measured peak, MB"


def test_wrong_gradients_are_crossed_out() -> None:
    """Exactly the points whose gradients are wrong, and the legend says so."""
    figure = plot_compiled({"bert": POINTS})
    (axis,) = figure.axes
    (crosses,) = (line for line in axis.lines if line.get_marker() == "x")
    assert list(crosses.get_xdata()) == [9]
    assert list(crosses.get_ydata()) == [1.1]
    assert "wrong gradients" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_same_points_give_the_same_file(tmp_path: Path) -> None:
    """A figure written twice has the same bytes."""
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        plot_compiled({"bert": POINTS, "llama": POINTS[2:]}, path)
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_drawn_is_refused() -> None:
    """No timed step, and too many models."""
    with pytest.raises(ValueError, match="no compiled step to draw"):
        plot_compiled({"bert": ()})
    with pytest.raises(ValueError, match="5 models do not fit"):
        plot_compiled({str(i): POINTS for i in range(5)})
