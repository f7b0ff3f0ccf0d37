"""Functions of Python that stand in users' files for a time, and tell what they are asked.

``getattr``, ``hasattr``, ``dir``, ``id`` and ``open`` are called without a frame of their own, or
by too many others to be looked at one by one. Functions of ``os`` that look at files are
exchanged in ``os`` itself.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from .ledger import LENT
from .named_reads import is_library_file, is_users_file

_WHAT_THEY_TAKE = (os.supports_fd, os.supports_dir_fd, os.supports_follow_symlinks)


class ExchangedFunctions:
    """The functions in the place of Python's own, and where they stand.

    Parameters
    ----------
    on_attribute
        Called with an object and the name of an attribute that ``getattr`` or ``hasattr``
        is asked for.
    on_names
        Called with an object whose names ``dir`` is asked for.
    on_path
        Called with what names a file, and the frame that asks for the file.
    real
        Returns what a stand-in is in the place of, and any other object itself.
    """

    def __init__(
        self,
        on_attribute: Callable[[Any, str], None],
        on_names: Callable[[Any], None],
        on_path: Callable[[Any, types.FrameType], None],
        real: Callable[[Any], Any],
    ) -> None:
        self._on_attribute, self._on_names = on_attribute, on_names
        self._on_path, self._real = on_path, real
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        self._tables: set[int] = set()
        self._thread = threading.get_ident()
        self._instead = self._exchanged()

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, they stand there."""
        self._thread = threading.get_ident()
        LENT.update(map(id, self._instead.values()))
        of_files: list[tuple[Any, str]] = [
            *((os, name) for name in ("stat", "lstat", "listdir", "scandir", "access")),
            (io, "open"),
            (builtins, "open"),
        ]
        before = [getattr(module, name) for module, name in of_files]
        listed = []
        for (module, name), own in zip(of_files, before, strict=True):
            instead = self._open(own) if name == "open" else self._of_path(own)
            setattr(module, name, instead)
            listed += [(known, instead) for known in _WHAT_THEY_TAKE if own in known]
        for known, instead in listed:
            known.add(instead)
        try:
            for table in _tables_of_users():  # before forward runs, which may go through one
                self.exchange(table)
            yield
        finally:
            for known, instead in listed:
                known.discard(instead)
            for (module, name), own in zip(of_files, before, strict=True):
                setattr(module, name, own)
            for table, name, own in reversed(self._undo):
                if own is None:
                    table.pop(name, None)
                else:
                    table[name] = own
            self._undo.clear()
            LENT.difference_update(map(id, self._instead.values()))
            self._tables.clear()

    def let_go(self) -> None:
        """Forget who is told: the collector may come late, and objects stay."""
        self._on_attribute = self._on_names = self._on_path = self._real = _nobody
        self._instead.clear()

    def exchange(self, table: dict[str, Any]) -> None:
        """Put the functions that note questions in the place of Python's own in a user's file."""
        if id(table) in self._tables:
            return
        self._tables.add(id(table))
        for name, instead in self._instead.items():
            own = vars(builtins)[name]
            if name not in table or table[name] is own:
                self._undo.append((table, name, table.get(name)))
                table[name] = instead

    def _exchanged(self) -> dict[str, Callable[..., Any]]:
        """Functions that note what they are asked, by the names of Python's own."""

        def is_mine(name: Any) -> bool:
            return threading.get_ident() == self._thread and isinstance(name, str)

        def asked_getattr(holder: Any, name: str, *default: Any) -> Any:
            if is_mine(name):
                self._on_attribute(holder, name)
            return getattr(holder, name, *default)

        def asked_hasattr(holder: Any, name: str) -> bool:
            if is_mine(name):
                self._on_attribute(holder, name)
            return hasattr(holder, name)

        def asked_dir(*holder: Any) -> list[str]:
            if not holder:
                return sorted(sys._getframe(1).f_locals)
            if is_mine(""):
                self._on_names(*holder)
            return dir(*holder)

        return {
            "getattr": asked_getattr,
            "hasattr": asked_hasattr,
            "dir": asked_dir,
            "id": lambda value: id(self._real(value)),
            "open": self._open(builtins.open),
        }

    def _of_path(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            self._on_path(path, sys._getframe(1))
            return own(path, *args, **kwargs)

        return asked

    def _open(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(mode, str) and not set(mode) & set("wax+"):
                self._on_path(file, sys._getframe(1))
            return own(file, mode, *args, **kwargs)

        return opened


def _tables_of_users() -> list[dict[str, Any]]:
    """The names of each of the user's files that is imported."""
    found = []
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            name = vars(module).get("__file__")
            if isinstance(name, str) and _is_own_file(name):
                found.append(vars(module))
    return found


@lru_cache(maxsize=2**16)  # more than there are modules: all are gone through at each capture
def _is_own_file(name: str) -> bool:
    """Whether the user wrote it, and did not install it."""
    return is_users_file(name) and not is_library_file(name)


def _nobody(*_told: Any) -> None:
    """Stand in for who is told, once the capture is over."""


__all__ = ["ExchangedFunctions"]
