"""Classes of objects that a step has met, whose attributes are seen when they are read.

For the time of the trace the ``__getattribute__`` of each is replaced.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .named_reads import is_library
from .snapshots import ABSENT
from .whole_dicts import ALL_AT_ONCE, who_asks

logger = logging.getLogger(__name__)

_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE, Py_TPFLAGS_IMMUTABLETYPE


class WhoIsTold(Protocol):
    """Who hears of what is read."""

    def note(self, holder: Any, name: str) -> None:
        """An attribute of an object is read."""

    def asked_for_all(self, holder: Any, code: types.CodeType) -> None:
        """A function of the user's own asks for all attributes of an object at once."""

    def cannot_watch(self, cls: type) -> None:
        """A class does not let its method be replaced."""


class WatchedClasses:
    """The classes, each with the method that it has itself."""

    def __init__(self) -> None:
        self._own: dict[type, Any] = {}
        self._told: WhoIsTold | None = None

    def __contains__(self, cls: type) -> bool:
        return cls in self._own

    def add(self, cls: type) -> None:
        """Watch a class from now on, if Python lets its methods be replaced."""
        changeable = cls.__flags__ & _HEAP_TYPE and not cls.__flags__ & _IMMUTABLE_TYPE
        if changeable and cls not in self._own:
            self._own[cls] = vars(cls).get("__getattribute__", ABSENT)
            if self._told is not None:
                self._exchange(cls, self._told)

    @contextmanager
    def active(self, told: WhoIsTold) -> Iterator[None]:
        """While active, what is read is told."""
        self._told = told
        try:
            for cls in list(self._own):
                self._exchange(cls, told)
            yield
        finally:  # after an error, too
            self._told = None
            for cls, own in self._own.items():
                put_back(cls, own)

    def _exchange(self, cls: Any, told: WhoIsTold) -> None:
        own, note = self._own[cls], told.note

        def watched(holder: Any, name: str) -> Any:
            note(holder, name)
            if name in ALL_AT_ONCE:
                code = who_asks(sys._getframe(1))
                if code and not is_library(code):
                    told.asked_for_all(holder, code)
            if own is ABSENT:
                return super(cls, holder).__getattribute__(name)
            return own(holder, name)

        try:
            cls.__getattribute__ = watched
        except Exception:  # a metaclass that forbids changes may raise anything
            logger.debug("%s cannot be watched", cls, exc_info=True)
            del self._own[cls]
            told.cannot_watch(cls)


def put_back(cls: Any, own: Any) -> None:
    """Give a class its own ``__getattribute__`` again; ``ABSENT`` if it had inherited it."""
    if own is ABSENT:
        if "__getattribute__" in vars(cls):
            del cls.__getattribute__
    else:
        cls.__getattribute__ = own


__all__ = ["WatchedClasses", "WhoIsTold", "put_back"]
