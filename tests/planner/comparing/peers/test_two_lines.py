"""Two joined lines through points: the least squares, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.comparing.peers.two_lines import TwoLines


def squares(x: np.ndarray, y: np.ndarray, joint: float) -> float:
    """The least sum of squared distances with a joint there."""
    columns = np.stack([np.ones_like(x), x, np.maximum(x - joint, 0)], axis=1)
    found, *_ = np.linalg.lstsq(columns, y, rcond=None)
    return float(((columns @ found - y) ** 2).sum())


def drawn(fit: TwoLines, x: np.ndarray) -> np.ndarray:
    """Where the lines pass; the second from the joint on."""
    slopes, levels = fit.calc_slopes(), fit.intercepts
    number = 0 if len(slopes) == 1 else (x > fit.fit_breaks[1]).astype(int)
    return slopes[number] * x + levels[number]


def test_a_bend_is_found_where_it_is() -> None:
    """Points on two lines that meet between two of them."""
    x = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    y = np.where(x < 2.5, x, 2.5 + 3 * (x - 2.5))
    fit = TwoLines(x, y)
    fit.fit(n_segments=2)
    assert fit.fit_breaks == pytest.approx([0, 2.5, 5])
    assert fit.calc_slopes() == pytest.approx([1, 3])
    assert fit.intercepts == pytest.approx([0, -5])


def test_one_line_is_the_regression() -> None:
    """As numpy has it."""
    x, y = np.array([0.0, 0.3, 0.7, 1.0]), np.array([0.1, 0.2, 0.9, 0.8])
    fit = TwoLines(x, y)
    fit.fit(n_segments=1)
    slope, level = np.polyfit(x, y, 1)
    assert (fit.calc_slopes(), fit.intercepts) == (pytest.approx([slope]), pytest.approx([level]))


def test_a_lone_point_is_a_level() -> None:
    """A module of one operator has one point."""
    fit = TwoLines([0.5], [0.25])
    fit.fit(n_segments=1)
    assert (fit.calc_slopes().tolist(), fit.intercepts.tolist()) == ([0.0], [0.25])


def test_three_lines_are_refused() -> None:
    """PyTorch asks for one or two."""
    with pytest.raises(ValueError, match="one line or two can be fitted, not 3"):
        TwoLines([0, 1], [0, 1]).fit(n_segments=3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=4, max_size=12))
def test_no_joint_is_better(points: list[tuple[int, float]]) -> None:
    """Of 500 joints none leaves a lower sum of squares, and the lines meet at the joint."""
    given = dict(points)
    x = np.array(sorted(given), dtype=float) / 50
    y = np.array([given[key] for key in sorted(given)])
    if len(x) < 4:
        return
    fit = TwoLines(x, y)
    fit.fit(n_segments=2)
    own = float(((drawn(fit, x) - y) ** 2).sum())
    best = min(squares(x, y, joint) for joint in np.linspace(x[0], x[-1], 500))
    assert own <= best + 1e-9
    joint = fit.fit_breaks[1]
    ends = fit.calc_slopes() * joint + fit.intercepts
    assert ends[0] == pytest.approx(ends[1], abs=1e-9)
