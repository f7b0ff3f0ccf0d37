"""What functions under ``functools.lru_cache`` keep of a step.

A mask or a table of positions is often made once and kept by its function. A function that is
called for the first time while a step is captured keeps a stand-in, which nobody may find
there afterwards. Such caches are written in C and name what they hold to the garbage
collector alone. It knows caches that the step's code does not name, too, but for those that a
process has frozen (``gc.freeze``).
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..private_torch.fake_tensors import FakeTensor
from .holders import dict_of

CACHED = type(functools.lru_cache(len))  # no other name


class FunctionCaches:
    """Such functions, as they are when a capture begins: only what changes is opened later."""

    def __init__(self) -> None:
        found = gc.get_referrers(CACHED)  # an object refers to its class
        self._before = {id(f): (f, _looks(f)) for f in found if type(f) is CACHED}

    def kept_stand_ins(self, met: Iterable[Any]) -> Iterator[tuple[Any, list[FakeTensor]]]:
        """Return each function whose cache holds stand-ins, and these; PyTorch's own may.

        Parameters
        ----------
        met
            Such functions that the step's code names; some may be new.
        """
        known = {id(f): (f, None) for f in met if type(f) is CACHED} | self._before
        for function, before in known.values():
            if str(function.__module__).startswith("torch.") or _looks(function) == before:
                continue
            found = list(_stand_ins(gc.get_referents(function)))
            if found:
                yield function, found

    def forget_stand_ins(self, met: Iterable[Any]) -> None:
        """Empty these caches: their functions are asked again."""
        for function, _ in self.kept_stand_ins(met):
            function.cache_clear()


def _looks(function: Any) -> tuple[object, ...]:
    """How often a function has computed, and which objects its cache holds."""
    held = gc.get_referents(function)
    values = (v for part in held if type(part) is dict for v in part.values())  # if unbounded
    return function.cache_info().misses, *map(id, held), *map(id, values)


_ATOMS = {str, bytes, int, float, complex, bool, type(None)}
_WITHOUT_TENSORS = {"builtins", "typing", "types", "inspect", "functools", "re", "pathlib"}
_NOT_OPENED = (torch.Tensor, torch.nn.Module, type, types.ModuleType, types.FunctionType)


def _stand_ins(items: Iterable[Any]) -> Iterator[FakeTensor]:
    """Stand-ins at any depth of containers and plain objects."""
    seen: set[int] = set()
    todo = list(items)
    while todo:
        item = todo.pop()
        if type(item) in _ATOMS or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, FakeTensor):
            yield item
        elif isinstance(item, (tuple, list, set, frozenset)):
            todo.extend(item)
        elif isinstance(item, dict):
            todo.extend(dict.values(item))
        elif not isinstance(item, _NOT_OPENED):
            todo.extend(dict_of(item).values())
            todo.extend(m.__get__(item) for m in _slots_of(type(item)) if _is_filled(m, item))


def _slots_of(cls: type) -> list[Any]:
    if cls.__module__ in _WITHOUT_TENSORS:
        return []
    found = (member for base in cls.__mro__ for member in vars(base).values())
    return [member for member in found if type(member) is types.MemberDescriptorType]


def _is_filled(member: Any, item: Any) -> bool:
    try:
        member.__get__(item)
    except AttributeError:
        return False
    return True


__all__ = ["CACHED", "FunctionCaches"]
