from __future__ import annotations

import pytest

from planner.comparison_record import ComparisonRow
from planner.plots import plot_predicted

from .made import MB, comparison, row, step, whole_comparison


def test_points_are_at_their_figures() -> None:
    """Predicted to the right, measured upwards, and the difference below."""
    left, right, apart, points = plot_predicted(whole_comparison()).axes

    def of(axis: object, label: str) -> list[float]:
        (line,) = [one for one in axis.lines if one.get_label() == label]  # type: ignore[attr-defined]
        return [float(v) for pair in line.get_xydata() for v in pair]

    assert of(left, "other strategies") == pytest.approx([60, 61])
    assert of(left, "auto (ours)") == pytest.approx([40, 40])
    assert of(right, "auto (ours)") == pytest.approx([20, 21])
    assert of(apart, "other strategies") == pytest.approx([60, 100 / 60])
    assert of(points, "other strategies") == pytest.approx([30, 2])


def test_bands_are_one_per_cent_and_three_points() -> None:
    """The grey areas are the promise of the predictions."""
    left, right, apart, points = plot_predicted(whole_comparison()).axes
    assert set(apart.collections[0].get_paths()[0].vertices[:, 1]) == {-1.0, 1.0}
    assert set(points.collections[0].get_paths()[0].vertices[:, 1]) == {-3.0, 3.0}
    assert left.get_xlabel() == ""
    assert apart.get_xlabel() == "predicted peak, MB"
    assert right.get_ylabel() == "measured extra time, %"


def test_peaks_are_drawn_where_times_are_missing() -> None:
    """Steps that ran but were not timed have peaks."""
    untimed = row("a", 50 * MB, 0.1, measured=step(51 * MB, float("nan"), num_pairs=0))
    figure = plot_predicted(comparison(untimed))
    assert figure.axes[1].get_title() == "times were not measured"
    assert len(figure.axes[0].lines) == 2  # the diagonal and the point


def test_without_measurements_there_is_nothing_to_draw() -> None:
    """Predictions alone, errors and peers alone are refused."""
    peer = ComparisonRow(strategy="p", kind="peer", measured=step(MB, 1.0))
    with pytest.raises(ValueError, match="none of 2 rows has both"):
        plot_predicted(comparison(row("a", MB, 0.1), peer))
