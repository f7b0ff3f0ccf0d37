from __future__ import annotations

import math

import pytest

from planner.plots import plot_growth
from planner.plots.growth import fitted_power

MB = 10**6


def _depths(power: float, overhead: float, off: int = 0) -> list[tuple[int, int, float]]:
    return [(n, int(MB * n**power) + off * n, overhead) for n in (4, 16, 64, 256)]


def test_powers_are_fitted_and_named() -> None:
    """Linear and square-root growth are told apart in the legend."""
    figure = plot_growth({"none": _depths(1, 0.0), "uniform_sqrt": _depths(0.5, 0.3)})
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["none: layers^1.00", "uniform_sqrt: layers^0.50"]
    left, right = figure.axes
    assert list(left.lines[1].get_ydata()) == pytest.approx([2, 4, 8, 16])
    assert list(right.lines[1].get_ydata()) == pytest.approx([30] * 4)
    assert left.get_ylabel() == "peak memory, MB"


def test_what_grows_anyway_is_taken_off() -> None:
    """Parameters grow with depth whatever is recomputed; without them the root is seen."""
    off = {n: 10 * MB * n for n in (4, 16, 64, 256)}
    depths = {"uniform_sqrt": _depths(0.5, 0.3, 10 * MB)}
    figure = plot_growth(depths, subtract_bytes=off)
    assert figure.axes[0].get_ylabel() == "peak memory without model, MB"
    assert "layers^0.50" in figure.legends[0].get_texts()[0].get_text()


def test_fit_needs_two_depths() -> None:
    """One depth has no power."""
    assert fitted_power([(4, 10, 0.0)]) is None


def test_what_cannot_be_drawn_is_left_out_or_refused() -> None:
    """Infinite overheads are skipped; nothing at all, and too many, are errors."""
    figure = plot_growth({"a": [(2, MB, math.nan), (4, MB, 0.1)], "b": []})
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[4]]
    with pytest.raises(ValueError, match="no depth to draw"):
        plot_growth({"a": []})
    with pytest.raises(ValueError, match="9 strategies cannot be told apart"):
        plot_growth({str(i): _depths(1, 0) for i in range(9)})
