"""Budgets of a comparison, as people write them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.comparing.budgets import AskedBudget, even_budgets, in_bytes, read_budgets

NAMES = ("none", "uniform_sqrt")


@pytest.mark.parametrize(
    ("asked", "label", "num_bytes"),
    [
        (0.6, "60%", 600),
        (1.0, "100%", 1000),
        ("0.6", "60%", 600),
        ("60%", "60%", 600),
        (" 62.5 % ", "62.5%", 625),
        (4096, "4096B", 4096),
        ("2B", "2B", 2),
        ("4096", "4096B", 4096),
        ("12GB", "12GB", 12 * 10**9),
        ("1 KiB", "1KiB", 1024),
        ("uniform_sqrt", "uniform_sqrt", 77),
    ],
)
def test_a_budget_is_read(asked: AskedBudget, label: str, num_bytes: int) -> None:
    """Shares are of the unplanned peak, names stand for a strategy's own peak."""
    (budget,) = in_bytes(
        read_budgets([asked], NAMES), unplanned_peak_bytes=1000, own_peak_bytes=lambda name: 77
    )
    assert (budget.label, budget.num_bytes) == (label, num_bytes)


_NUMBERS = (0, 1, 0.0, -0.5, 1.5, -3, math.nan, math.inf, True, None, b"12GB", (0.5,))
_TEXTS = ("0", "1", "-1", "0%", "101%", "-60%", "1.5", "0.0", "nan", "", "auto", "12XB", "6 apples")


@pytest.mark.parametrize("asked", [*_NUMBERS, *_TEXTS])
def test_nonsense_is_an_error(asked: AskedBudget) -> None:
    """What is neither a share, nor bytes, nor a known name is refused."""
    with pytest.raises(ValueError, match=r"(budget|share)"):
        read_budgets([asked], NAMES)


@pytest.mark.parametrize("asked", [12, "12", 4095])
def test_a_bare_number_that_means_gigabytes_is_refused(asked: AskedBudget) -> None:
    """12 is 12 GB where plans are asked for, so here it is not silently 12 bytes."""
    with pytest.raises(ValueError, match=f"write '{asked}GB' for gigabytes"):
        read_budgets([asked], NAMES)


def test_a_sequence_is_asked_for() -> None:
    """One string is no sequence of budgets."""
    with pytest.raises(ValueError, match=r"write \['60%'\]"):
        read_budgets("60%", NAMES)


def test_a_budget_is_given_once() -> None:
    """The same budget twice would give rows that cannot be told apart."""
    with pytest.raises(ValueError, match="'60%' is given twice"):
        read_budgets([0.6, "60%"], NAMES)


def test_even_budgets_have_both_ends() -> None:
    """By default budgets go from the least peak to the unplanned one in equal steps."""
    budgets = even_budgets(300, 1000)
    assert [b.num_bytes for b in budgets] == [300, 400, 500, 600, 700, 800, 900, 1000]
    assert (budgets[0].label, budgets[3].label, budgets[-1].label) == ("least", "60.0%", "100%")


def test_a_step_that_cannot_be_lowered_has_one_budget() -> None:
    """Where the least peak is the unplanned one there is one budget."""
    assert [b.num_bytes for b in even_budgets(1000, 1000)] == [1000]


def test_labels_of_near_budgets_have_more_digits() -> None:
    """Between 99.5 % and 100 % one digit does not tell eight budgets apart."""
    labels = [b.label for b in even_budgets(9_950_000_000, 10_000_000_000)]
    assert labels[:3] == ["least", "99.57%", "99.64%"]
    assert labels[-2:] == ["99.93%", "100%"]


@given(st.integers(1, 10**14), st.integers(0, 1000), st.integers(2, 12))
def test_no_two_even_budgets_have_one_label(peak_bytes: int, below_bytes: int, count: int) -> None:
    """Labels, and the shares that they say, are as many as the budgets."""
    budgets = even_budgets(max(1, peak_bytes - below_bytes), peak_bytes, count)
    labels = [b.label for b in budgets]
    assert len(set(labels)) == len(labels)
    shares = [float(label.rstrip("%")) for label in labels[1:]]
    assert len(set(shares)) == len(shares)
