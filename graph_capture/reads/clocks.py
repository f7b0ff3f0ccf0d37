"""Clocks that forward reads, and whether their readings affect what it computes.

A model may read the time for a log, which a plan need not repeat. Or it may compute
with the time, and a plan would use the one reading for ever. To tell the two apart,
the step is captured once more under clocks that show another time.

Known imperfection: a clock that is read by an installed package, or in C, is not
seen.
"""

from __future__ import annotations

import datetime
import dis
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .named_reads import with_inner

_NAMES = frozenset(
    f"{name}{unit}"
    for name in ("time", "perf_counter", "monotonic", "process_time", "thread_time")
    for unit in ("", "_ns")
)
_CALENDARS = frozenset({"gmtime", "localtime"})
_WRITTEN = frozenset({"ctime", "asctime", "strftime"})
_CLOCKS = _NAMES | _CALENDARS | _WRITTEN
_DATES = (datetime.datetime, datetime.date)
_ASKS = frozenset({"now", "utcnow", "today"})
_MODULES = ("time", "datetime")
_SHIFT_S = 34_862_417.31  # another year, month, day of the week, hour and second
_STEP_S = 17.3  # between two readings, so that their difference changes, too


class ClocksMet:
    """The user's functions that name a clock, and the globals that name it."""

    def __init__(self) -> None:
        self.where: str | None = None
        self._tables: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}

    def look(
        self,
        code: types.CodeType,
        table: dict[str, Any],
        names: Iterable[tuple[str, tuple[str, ...]]],
    ) -> None:
        """Look at a function.

        Parameters
        ----------
        table
            The function's globals.
        names
            The globals that it names, each with the attributes read from it.
        """
        for name, attributes in names:
            value = table.get(name)
            if _is_clock(value) or _asks_for_clock(value, attributes):
                self._note(code)
                self._tables[id(table), name] = (table, name)
        for function in with_inner(code):
            for instruction in dis.get_instructions(function):
                if instruction.opname == "IMPORT_NAME" and instruction.argval in _MODULES:
                    self._note(code)

    def _note(self, code: types.CodeType) -> None:
        if self.where is None:
            self.where = f"{code.co_filename.rpartition('/')[2]}, in {code.co_name}"

    @contextmanager
    def shifted(self) -> Iterator[None]:
        """While active, the clocks show another time to this thread."""
        clocks = _Shifted()
        undo: list[tuple[dict[str, Any], str, Any]] = []

        def exchange(table: dict[str, Any], name: str) -> None:
            shown = clocks.instead_of(table[name])
            if shown is not None:
                undo.append((table, name, table[name]))
                table[name] = shown

        try:
            for name in sorted(_CLOCKS & vars(time).keys()):
                exchange(vars(time), name)
            for name in ("datetime", "date"):
                exchange(vars(datetime), name)
            for table, name in self._tables.values():
                exchange(table, name)
            yield
        finally:
            for table, name, value in reversed(undo):
                table[name] = value


class _Shifted:
    """Make clocks that run ahead, and further ahead with each reading."""

    def __init__(self) -> None:
        self._mine = threading.get_ident()
        self._num_read = 0

    def _ahead_s(self) -> float:
        if threading.get_ident() != self._mine:
            return 0.0
        self._num_read += 1
        return _SHIFT_S + self._num_read * _STEP_S

    def instead_of(self, clock: Any) -> Any:
        """Return the replacement for a clock; ``None`` for something else."""
        if isinstance(clock, type) and clock in _DATES:
            return self._date(clock)
        if not _is_clock(clock):
            return None
        if clock.__name__ in _CALENDARS:
            now = time.time
            return lambda seconds=None: clock(
                now() + self._ahead_s() if seconds is None else seconds
            )
        if clock.__name__ in _WRITTEN:
            return self._written(clock)
        per_second = 10**9 if clock.__name__.endswith("_ns") else 1

        def ahead() -> Any:
            shown = clock()
            return shown + type(shown)(self._ahead_s() * per_second)

        return ahead

    def _written(self, clock: Any) -> Callable[..., Any]:
        num_given = 1 if clock.__name__ == "strftime" else 0  # arguments without the time
        now, local = time.time, time.localtime

        def written(*args: Any) -> Any:
            if len(args) > num_given and args[num_given] is not None:
                return clock(*args)
            ahead = now() + self._ahead_s()
            return clock(*args[:num_given], ahead if clock.__name__ == "ctime" else local(ahead))

        return written

    def _date(self, kind: Any) -> Any:
        def asked(name: str) -> Callable[..., Any]:
            own = getattr(kind, name)

            def answer(_cls: Any, *args: Any, **kwargs: Any) -> Any:
                return own(*args, **kwargs) + datetime.timedelta(seconds=self._ahead_s())

            return answer

        asks = {name: classmethod(asked(name)) for name in _ASKS if hasattr(kind, name)}
        return type(kind.__name__, (kind,), asks)


def _is_clock(value: Any) -> bool:
    return (
        isinstance(value, types.BuiltinFunctionType)
        and value.__module__ == "time"
        and value.__name__ in _CLOCKS
    )


def _asks_for_clock(value: Any, attributes: tuple[str, ...]) -> bool:
    if value is time:
        return bool({*attributes[:1]} & _CLOCKS) or not attributes
    if value is datetime:
        return bool({*attributes} & _ASKS) or not attributes
    return isinstance(value, type) and value in _DATES and bool({*attributes[:1]} & _ASKS)


__all__ = ["ClocksMet"]
