"""Methods that ran while a step was traced, and the classes where they lie.

Python calls special methods (``len(x)``, ``x[i]``, ``with x``) without reading an attribute,
and an object that forward itself makes is not known before it is used. So whatever way a
function was called, its class is looked up by the function's qualified name, and what lies
there counts as read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from .met import Met
from .named_reads import is_library, is_users, is_users_class, is_users_own
from .reads import Where

_BEFORE_METHODS = ("__call__", "__getattr__", "__getattribute__")
"""Of a user's own class: whoever defines one later changes what all its objects do."""


def note_methods(met: Met) -> list[types.FunctionType]:
    """Note where in their classes the methods lie that ran, and return these functions."""
    functions: dict[int, types.FunctionType] = {}
    for cls in _classes(met):
        users = [base for base in cls.__mro__ if is_users_class(base)]
        for base in users:
            table = met.table(base)
            for name, value in list(table.items()):
                ran = [f for f in _functions_in(value) if id(f.__code__) in met.seen]
                ran = [f for f in ran if is_users(f.__code__)]
                if not ran or (cls is type(met.root) and name == "forward"):
                    continue
                functions |= {id(f): f for f in ran if not is_library(f.__code__)}
                for earlier in (*users[: users.index(base)], base):  # where another may appear
                    _note(met, earlier, name)
        for base in filter(is_users_own, users):
            for name in _BEFORE_METHODS:
                _note(met, base, name)
    return list(functions.values())


def _note(met: Met, cls: type, name: str) -> None:
    place = f"'{cls.__name__}.{name}'", Where.TABLE, met.table(cls), name
    met.named.setdefault((id(met.table(cls)), name), place)


def _classes(met: Met) -> set[type]:
    """Classes of what was met, and those that the names of functions lead to."""
    found: set[type] = {type(module) for module in met.root.modules()}
    found |= {type(holder) for holder, _ in met.noted.values() if holder is not None}
    for value in met.seen.values():
        found.add(value if isinstance(value, type) else type(value))
    for code, table in met.ran.values():
        value = table.get(code.co_qualname.partition(".")[0])
        for name in code.co_qualname.split(".")[1:-1]:
            value = vars(value).get(name) if isinstance(value, type) else None
        if isinstance(value, type):
            found.add(value)
    found |= {type(cls) for cls in found}  # metaclasses
    return {cls for cls in found if is_users_class(cls)}


def _functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Functions that an attribute of a class calls."""
    parts: tuple[Any, ...] = (value,)
    if isinstance(value, (staticmethod, classmethod)):
        parts = (value.__func__,)
    elif isinstance(value, property):
        parts = value.fget, value.fset, value.fdel
    elif isinstance(value, functools.cached_property):
        parts = (value.func,)
    yield from (part for part in parts if isinstance(part, types.FunctionType))


__all__ = ["note_methods"]
