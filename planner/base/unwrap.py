"""Find a planned forward inside other tools' wrappers.

Libraries bind a module's forward as a method, wrap it in functions that name
what they wrap (``functools.wraps``), and unwrap it again.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T")
_MAX_DEPTH = 32


def refuse_no_module(model: object) -> None:
    """Refuse what is not a module.

    Raises
    ------
    TypeError
        When it is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")


def find_wrapped(forward: Any, kind: type[_T]) -> _T | None:
    """Return the first object of a class behind methods, partial functions and wrappers."""
    for _ in range(_MAX_DEPTH):
        if isinstance(forward, kind):
            return forward
        if isinstance(forward, functools.partial):
            forward = forward.func
            continue
        following = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
        if following is None:
            return None
        forward = following
    return None


def is_reached(model: nn.Module, forward: object) -> bool:
    """Whether a call of ``model`` reaches ``forward``."""
    return find_wrapped(vars(model).get("forward"), type(forward)) is forward
