"""What solvers are asked for, checked at the door."""

from __future__ import annotations

import operator


def checked_budget(budget_bytes: object) -> int:
    """A budget as an integer.

    A float would be compared without a word, with nan everything fits or nothing.

    Raises
    ------
    ValueError
        When it is no whole number of bytes from 0 on.

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
        pass  # said below, with every other kind of wrong budget
    raise ValueError(
        f"a budget is a whole number of bytes from 0 on, not negative, got {budget_bytes!r:.100}; "
        "int(share * peak), say"
    )


def check_time_limit(time_limit_s: object) -> None:
    """Refuse what is no time.

    Raises
    ------
    ValueError
        When it is no number from 0 on.
    """
    number = isinstance(time_limit_s, (int, float)) and not isinstance(time_limit_s, bool)
    if not number or not time_limit_s >= 0:  # type: ignore[operator]
        raise ValueError(
            f"time_limit_s is a number of seconds from 0 on, not negative, got {time_limit_s!r}"
        )
