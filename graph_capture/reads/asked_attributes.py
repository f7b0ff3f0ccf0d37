"""Attributes that ``getattr`` and ``hasattr`` are asked for, of what cannot be watched.

Functions, classes, files, namespaces, tensors and objects of the standard library: an
attribute that is not there when a step is traced may be there in a later one.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..private_torch.fake_tensors import FakeTensor
from .holders import dict_of, has_dict, in_class, weakly
from .named_reads import is_library, is_users, is_users_class
from .reads import Place, Where, place_of
from .snapshots import ABSENT, BY_VALUE, CONTAINERS, snapshot

_PLAIN = (*BY_VALUE, *CONTAINERS, torch.dtype, torch.device)


class AskedAttributes:
    """Objects, each with a name that it was asked for."""

    def __init__(self) -> None:
        self._asked: dict[tuple[int, str], tuple[Any, str, str]] = {}
        self._listed: dict[int, type] = {}

    def note(self, holder: Any, name: str, path: str) -> None:
        """Remember a question; ``path`` names the object."""
        if not name.startswith("__"):
            self._asked.setdefault((id(holder), name), (holder, name, path))

    def note_names(self, cls: type) -> None:
        """Remember a class whose names were listed."""
        self._listed[id(cls)] = cls

    @contextmanager
    def of_stand_ins(self, asked: Callable[[Any, str], None]) -> Iterator[None]:
        """While active, tell of attributes that a stand-in of a tensor is asked for in vain."""
        kind: Any = FakeTensor

        def missing(tensor: Any, name: str) -> Any:
            code = sys._getframe(1).f_code
            if is_users(code) and not is_library(code):
                asked(tensor, name)
            raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {name!r}")

        kind.__getattr__ = missing
        try:
            yield
        finally:
            del kind.__getattr__

    def places(self) -> Iterator[Place]:
        """Where each attribute lies, or would lie."""
        for holder, name, path in self._asked.values():
            label = f"'{path}.{name}'"
            if isinstance(holder, type):
                yield from _in_class(holder, name)
            elif isinstance(holder, types.ModuleType):
                yield from _in_module(holder, name, label)
            elif weakly(holder) is holder:  # a namespace, an object with slots
                yield place_of(label, Where.ATTRIBUTE, holder, name)
            else:
                yield from _in_object(holder, name, label)
        for cls in self._listed.values():
            for base in filter(is_users_class, cls.__mro__):
                label = f"the names of class '{base.__name__}'"
                yield Place(
                    label=label,
                    where=Where.ADDED,
                    holder=weakly(base),
                    key="__dict__",
                    held=snapshot(""),
                    names=frozenset(vars(base)),
                )


def _in_class(cls: type, name: str) -> Iterator[Place]:
    found, _ = in_class(cls, name)
    for base in filter(is_users_class, cls.__mro__):
        yield place_of(f"'{base.__name__}.{name}'", Where.TABLE, vars(base), name)
        if base is found:
            return


def _in_module(module: types.ModuleType, name: str, label: str) -> Iterator[Place]:
    value = vars(module).get(name, ABSENT)
    if value is ABSENT and hasattr(module, name):  # a property, as torch.backends has them
        place = place_of(label, Where.ATTRIBUTE, weakly(module), name)
        if isinstance(place.now(), _PLAIN):
            yield place
    elif value is ABSENT or isinstance(value, _PLAIN):
        yield place_of(label, Where.TABLE, vars(module), name)


def _in_object(holder: Any, name: str, label: str) -> Iterator[Place]:
    if name in dict_of(holder):
        yield place_of(label, Where.DICT, weakly(holder), name)
    elif has_dict(holder) and not _has(holder, name):
        yield Place(
            label=label, where=Where.SHADOW, holder=weakly(holder), key=name, held=snapshot(ABSENT)
        )


def _has(holder: Any, name: str) -> bool:
    """Whether an object has an attribute; of a function, its own table says so."""
    if isinstance(holder, types.FunctionType):
        return False
    try:
        return hasattr(holder, name)
    except Exception:  # noqa: BLE001 - the object's own __getattr__, such as a dict's lookup
        return True


__all__ = ["AskedAttributes"]
