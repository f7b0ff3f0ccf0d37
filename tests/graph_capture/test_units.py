"""Bytes and times as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from graph_capture.units import format_bytes, format_us, parse_bytes


@pytest.mark.parametrize(
    ("quantity", "unit", "expected"),
    [
        (40, "gb", 40 * 10**9),
        ("40GiB", "gb", 40 * 2**30),
        ("1.5 kB", "gb", 1500),
        (".5", "gb", 5 * 10**8),
        ("1e3", "b", 1000),
        ("2tib", "b", 2 * 2**40),
    ],
)
def test_amounts_of_memory(quantity: Any, unit: str, expected: int) -> None:
    """A number counts in the default unit, a string may name its own."""
    assert parse_bytes(quantity, default_unit=unit) == expected


@pytest.mark.parametrize(
    "quantity", [True, None, [], "", "GB", "-3GB", "3 apples", 0, -1, float("inf"), float("nan")]
)
def test_what_is_no_amount_is_refused(quantity: Any) -> None:
    """Booleans, signs, unknown units, zero and what is not finite are refused."""
    with pytest.raises(ValueError, match=r"amount of memory|unknown unit"):
        parse_bytes(quantity)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (2 * 10**12, "2 TB")],
)
def test_bytes_in_words(num_bytes: int, text: str) -> None:
    """Bytes are written in decimal units, and never as 1000 of one."""
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("time_us", "text"), [(1.5, "1.5 us"), (999.6, "1 ms"), (2_500_000, "2.5 s")]
)
def test_times_in_words(time_us: float, text: str) -> None:
    """Microseconds are written in the unit that reads best."""
    assert format_us(time_us) == text


def test_a_unit_that_is_nearly_one_is_named() -> None:
    """A letter too many is no riddle."""
    with pytest.raises(ValueError, match="unknown unit 'gigb'; did you mean 'gib'"):
        parse_bytes("40gigb")
