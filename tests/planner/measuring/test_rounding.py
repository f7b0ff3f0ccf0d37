"""Words for how far steps are apart, and the distances behind them."""

from __future__ import annotations

import math

import pytest
import torch

from planner.measuring.rounding import _distance, largest_error, verdict_word


@pytest.mark.parametrize(
    ("loss_error", "error", "dtype", "draws", "expected"),
    [
        (0.0, 0.0, None, True, "equal"),
        (1e-7, 1e-6, None, True, "right"),
        (1e-7, 0.3, None, True, "WRONG"),
        (0.3, 0.3, None, True, "other draws"),
        (0.3, 0.3, None, False, "WRONG"),
        (math.nan, 0.3, None, True, "other draws"),
        (1e-7, math.inf, None, True, "WRONG"),
        (1e-3, 1e-2, torch.bfloat16, True, "right"),
        (1e-3, 0.3, torch.bfloat16, True, "WRONG"),
    ],
)
def test_errors_are_judged_where_the_loss_is_eager_s(
    loss_error: float, error: float, dtype: torch.dtype | None, draws: bool, expected: str
) -> None:
    """Another loss means other dropout masks, or a mistake where nothing is drawn."""
    assert verdict_word(loss_error, error, dtype, draws=draws) == expected


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([3.0, 4.0, -INF, NAN], [3.0, 4.0, -INF, NAN], 0.0),
        ([3.0, 4.0, -INF, NAN], [3.0, 4.5, -INF, NAN], 0.1),
        ([3.0, 4.0, INF], [3.0, 4.0, 5.0], INF),
        ([3.0, 4.0, 5.0], [3.0, 4.0, NAN], INF),
        ([3.0, 4.0, INF], [3.0, 4.0, -INF], INF),
        ([3.0, 4.0, INF], [3.0, 4.0, NAN], INF),
        ([3.0, INF], None, INF),
        ([3.0, 4.0], None, 1.0),
        ([3.0, 4j], [3.0, 4.5j], 0.1),
    ],
)
def test_places_that_are_not_finite_must_coincide(
    expected: list[float], actual: list[float] | None, error: float
) -> None:
    """A mask of -inf is no difference and hides none; imaginary parts count."""
    found, most = _distance(
        {"buffer b": torch.tensor(expected)},
        {"buffer b": None if actual is None else torch.tensor(actual)},
        "buffer ",
        1e-3,
    )
    assert found == pytest.approx(error)
    assert most == ("buffer b" if error else "")


def test_the_largest_error_is_relative_to_its_tensor_or_to_a_share_of_all() -> None:
    """By hand: 1 of a norm of 5; a tensor of zeros counts with a thousandth of all norms."""
    expected, zeros = torch.tensor([3.0, 4.0]), torch.zeros(2)
    pairs = [(torch.tensor([3.0, 5.0]), expected), (torch.tensor([0.0, 0.0001]), zeros)]
    assert largest_error(pairs) == pytest.approx(0.2)
    pairs[1] = (torch.tensor([0.0, 0.005]), zeros)
    assert largest_error(pairs) == pytest.approx(1.0)
    assert math.isnan(largest_error([(torch.tensor([math.nan, 0.0]), expected)]))
