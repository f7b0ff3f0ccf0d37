"""Validate what callers ask of a solver."""

from __future__ import annotations

import operator


def checked_budget(budget_bytes: object) -> int:
    """Return a budget as an integer.

    A float would be compared silently; with nan, everything fits or nothing does.

    Raises
    ------
    ValueError
        When it is not a whole number of bytes, 0 or more.

    Examples
    --------
    >>> checked_budget(40_000_000_000)
    40000000000
    """
    try:
        if not isinstance(budget_bytes, bool):
            budget = operator.index(budget_bytes)  # type: ignore[arg-type]
            if budget >= 0:
                return budget
    except TypeError:
        pass  # reported below, with every other kind of wrong budget
    raise ValueError(
        f"a budget is a whole number of bytes from 0 on, not negative, got {budget_bytes!r:.100}; "
        "int(share * peak), say"
    )


def check_time_limit(time_limit_s: object) -> None:
    """Refuse a time limit that is not a time.

    Raises
    ------
    ValueError
        When it is not a number, 0 or more.
    """
    number = isinstance(time_limit_s, (int, float)) and not isinstance(time_limit_s, bool)
    if not number or not time_limit_s >= 0:  # type: ignore[operator]
        raise ValueError(
            f"time_limit_s is a number of seconds from 0 on, not negative, got {time_limit_s!r}"
        )
