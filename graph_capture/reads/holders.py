"""Read an object's contents without running its code."""

from __future__ import annotations

import types
import weakref
from typing import Any

from .named_reads import is_users_file


def dict_of(holder: Any) -> dict[str, Any]:
    """Return an object's ``__dict__``; empty if it has none."""
    try:
        held = object.__getattribute__(holder, "__dict__")
    except AttributeError:  # slots only
        return {}
    return held if isinstance(held, dict) else {}


def has_dict(holder: Any) -> bool:
    """Whether an object has a table of attributes of its own, so that it may get more."""
    try:
        return isinstance(object.__getattribute__(holder, "__dict__"), dict)
    except AttributeError:
        return False


def in_class(cls: type, name: str) -> tuple[type | None, Any]:
    """Return the class in which an attribute is found, and its value there."""
    for base in cls.__mro__:
        if name in vars(base):
            return base, vars(base)[name]
    return None, None


def weakly(holder: Any) -> Any:
    """Return a weak reference to an object, or the object itself."""
    try:
        return weakref.ref(holder)
    except TypeError:  # slots without __weakref__
        return holder


def may_change(module: types.ModuleType, name: str) -> bool:
    """Whether a name is in a user's module, or is a PyTorch function, which some people replace."""
    if is_users_module(module):
        return True
    inside = module.__name__ == "torch" or module.__name__.startswith("torch.")
    return inside and isinstance(
        vars(module)[name], (types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
    )


def is_users_module(module: types.ModuleType) -> bool:
    """Whether a module belongs to neither PyTorch nor Python."""
    file = getattr(module, "__file__", None)
    return module.__name__ == "__main__" or (file is not None and is_users_file(file))
