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
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..private_torch.fake_tensors import FakeTensor
from .holders import dict_of

CACHED = type(functools.lru_cache(len))  # no other name


class _Instances:
    """All functions of the class, looked for again where there may be others.

    An instance refers to its class. While nobody has let go of one, and the class has as many
    references, there are the same ones.
    """

    def __init__(self) -> None:
        self._known: list[weakref.ref[Any]] = []
        self._num_references = -1

    def found(self) -> list[Any]:
        """Return them."""
        functions = [reference() for reference in self._known]
        if sys.getrefcount(CACHED) != self._num_references or None in functions:
            functions = [f for f in gc.get_referrers(CACHED) if type(f) is CACHED]
            self._known = list(map(weakref.ref, functions))
            self._num_references = sys.getrefcount(CACHED)
        return functions


_INSTANCES = _Instances()


class FunctionCaches:
    """Such functions, as they are when a capture begins: only what changes is opened later."""

    def __init__(self) -> None:
        self._before = {id(f): (f, _looks(f)) for f in _INSTANCES.found() if not _is_ours(f)}

    def kept_stand_ins(self, met: Iterable[Any]) -> Iterator[tuple[Any, list[FakeTensor]]]:
        """Return each function whose cache holds stand-ins, and these; PyTorch's own may.

        Parameters
        ----------
        met
            Such functions that the step's code names; some may be new.
        """
        new = (f for f in met if type(f) is CACHED and not _is_ours(f))
        known = {id(f): (f, None) for f in new} | self._before
        for function, before in known.values():
            if _looks(function) == before:
                continue
            found = list(_stand_ins(gc.get_referents(function)))
            if found:
                yield function, found

    def forget_stand_ins(self, met: Iterable[Any]) -> None:
        """Empty these caches: their functions are asked again."""
        for function, _ in self.kept_stand_ins(met):
            function.cache_clear()


_OURS = {"torch", __name__.partition(".")[0], *sys.stdlib_module_names}


def _is_ours(function: Any) -> bool:
    """Whether a function is of Python, PyTorch or this package: no tensors of a model's in it.

    This package's hold names of thousands of files, and are asked in each capture.
    """
    return str(function.__module__).partition(".")[0] in _OURS


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
