"""Times from the user's function of a call, with another model as a fallback."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from .cost_model import (
    Call,
    CostModel,
    CostRecord,
)

MAX_US = 1e14  # three years

TimeFunction = Callable[[Call], float | None]


class UserCosts:
    """Ask the user's function first.

    Parameters
    ----------
    time_us
        Microseconds of a call, or ``None`` to leave it to ``otherwise``.
    otherwise
        The model for the other calls.
    """

    def __init__(self, time_us: TimeFunction, otherwise: CostModel) -> None:
        self._time_us = time_us
        self._otherwise = otherwise
        self._num_given = self._num_left = 0

    def time_ns(self, call: Call) -> int:
        """Nanoseconds of one run.

        Raises
        ------
        ValueError
            When the function returns something other than a time.
        """
        given = self._time_us(call)
        if given is None:
            self._num_left += 1
            return self._otherwise.time_ns(call)
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise ValueError(f"cost_model returned {given!r} for {call.func}, not microseconds")
        if (isinstance(given, float) and not isfinite(given)) or given < 0:
            raise ValueError(f"cost_model returned {given!r} us for {call.func}")
        if given > MAX_US:
            raise ValueError(
                f"cost_model returned {given!r:.40} us for {call.func}, more than {MAX_US:.0e}: is "
                "it in microseconds?"
            )
        self._num_given += 1
        return round(given * 1e3)

    def record(self) -> CostRecord:
        other = self._otherwise.record()
        name = getattr(self._time_us, "__name__", type(self._time_us).__name__)
        note = f"{self._num_given} calls given, {self._num_left} by {other.model}"
        return CostRecord(model=name, device=other.device, notes=(note, *other.notes))
