"""State what is proven and no more: with its scope, rounded down."""

from __future__ import annotations

import math

from graph_capture.units import format_bytes
from solvers.scopes import BoundScope

EAGERS_ORDER = "in eager's order"
"""Said of schedules whose first runs keep the order in which eager runs them."""

OTHER_ORDER = "not in eager's order: the bound does not speak of it"
"""The note of a row whose schedule the bounds do not cover."""


def scope_words(scope: BoundScope) -> str:
    """Return a bound's scope in words, to append to it."""
    return EAGERS_ORDER if scope is BoundScope.BASE_ORDER else f"for {scope.words}"


def bytes_rounded_down(num_bytes: int) -> str:
    """Format bytes with three digits, rounded down.

    >>> bytes_rounded_down(1_239_999_999)
    '1.23 GB'
    """
    step = 10 ** max(0, len(str(num_bytes)) - 3)
    return format_bytes(num_bytes // step * step)


def percent_rounded_down(share: float) -> str:
    """A share as a signed percentage with two digits, rounded down.

    >>> percent_rounded_down(0.129999)
    '+12.99%'
    """
    return f"{math.floor(share * 1e4) / 1e4:+.2%}"
