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


def kept_stand_ins(met: Iterable[Any]) -> Iterator[tuple[Any, list[FakeTensor]]]:
    """Return each function whose cache holds stand-ins, and these; PyTorch's own may.

    Parameters
    ----------
    met
        Such functions that the step's code names.
    """
    found_by_class = gc.get_referrers(CACHED)  # an object refers to its class
    functions = {id(f): f for f in (*met, *found_by_class) if type(f) is CACHED}
    for function in functions.values():
        if str(function.__module__).startswith("torch."):
            continue
        if function.cache_info().currsize:
            found = list(_stand_ins(gc.get_referents(function)))
            if found:
                yield function, found


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


def forget_stand_ins(met: Iterable[Any]) -> None:
    """Empty these caches: their functions are asked again."""
    for function, _ in kept_stand_ins(met):
        function.cache_clear()


__all__ = ["CACHED", "forget_stand_ins", "kept_stand_ins"]
