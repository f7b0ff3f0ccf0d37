"""Names in files and objects of Python and PyTorch: ``sys.argv``, ``torch.backends``, a logger.

These are neither watched nor compared as a whole, since almost none of their names is ever
changed. What a user's function names there is a plain value, or leads to one.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .holders import dict_of, is_users_module, weakly
from .reads import Place, Where, place_of
from .snapshots import ABSENT, BY_VALUE, CONTAINERS, size_of

_MAX_COMPARED = 200  # of larger tables, only the keys that occur in the function count
_MAX_OBJECTS = 100
# Their objects keep caches and counts, or are asked by other ways.
_CHANGE_BY_THEMSELVES = frozenset(
    {
        *("abc", "concurrent", "contextlib", "enum", "functools", "inspect", "io", "logging"),
        *("multiprocessing", "pathlib", "queue", "random", "re", "tempfile", "threading"),
        *("types", "typing", "warnings", "weakref", "_weakrefset", "unittest", "pdb", "bdb"),
    }
)


def foreign_places(
    module: types.ModuleType, attributes: Sequence[str], strings: frozenset[str]
) -> Iterator[Place]:
    """The plain value to which a chain of attributes leads.

    Parameters
    ----------
    module
        Python's or PyTorch's.
    attributes
        As they follow its name in a function.
    strings
        Of the function, for tables with too many items.
    """
    holder: Any = module
    path = module.__name__
    for name in attributes:
        try:
            value = getattr(holder, name, ABSENT)
        except Exception:  # noqa: BLE001  a property of a module may raise anything
            return
        path = f"{path}.{name}"
        if value is ABSENT or isinstance(value, (*BY_VALUE, *CONTAINERS)):
            large = isinstance(value, CONTAINERS) and size_of(value) > _MAX_COMPARED
            if large and isinstance(value, dict):
                for key in sorted(strings):
                    yield place_of(f"'{path}[{key!r}]'", Where.TABLE, value, key)
            elif not large and name in dict_of(holder):
                yield place_of(f"'{path}'", Where.TABLE, vars(holder), name)
            elif not large and value is not ABSENT:
                yield place_of(f"'{path}'", Where.ATTRIBUTE, weakly(holder), name)
            return
        is_code = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
        if is_code or isinstance(value, torch.Tensor):
            return
        if isinstance(value, types.ModuleType) and is_users_module(value):
            return
        holder = value


class ForeignObjects:
    """Objects of Python's and PyTorch's own classes that a step has met."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[Any, str]] = {}
        self._whole: set[int] = set()
        self._files: dict[int, types.ModuleType] = {}

    def meet(self, value: Any, path: str) -> None:
        """Remember an object."""
        if len(self._met) < _MAX_OBJECTS and dict_of(value) and weakly(value) is not value:
            self._met.setdefault(id(value), (value, path))

    def meet_whole(self, value: Any, path: str) -> None:
        """Remember an object whose own methods read what it holds."""
        if type(value).__module__.partition(".")[0] not in _CHANGE_BY_THEMSELVES:
            self.meet(value, path)
            self._whole.add(id(value))

    def meet_file(self, module: types.ModuleType) -> None:
        """Remember a file of the standard library that a function imports while it runs."""
        if module.__name__.partition(".")[0] in sys.stdlib_module_names:
            self._files[id(module)] = module

    def places(self, words: set[str]) -> Iterator[Place]:
        """Plain values in them whose names occur in the functions that were met."""
        for value, path in self._met.values():
            held = dict_of(value)
            whole = id(value) in self._whole
            for name in sorted(held.keys() if whole else words & held.keys()):
                if isinstance(held[name], (*BY_VALUE, *CONTAINERS) if whole else BY_VALUE):
                    yield place_of(f"'{path}.{name}'", Where.DICT, weakly(value), name)
        for module in self._files.values():
            for name in sorted(words & vars(module).keys()):
                if isinstance(vars(module)[name], (*BY_VALUE, list, tuple)):
                    label = f"'{module.__name__}.{name}'"
                    yield place_of(label, Where.TABLE, vars(module), name)


__all__ = ["ForeignObjects", "foreign_places"]
