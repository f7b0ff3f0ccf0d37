"""In-place changes that no container shows: array elements and iterator positions.

A planned step would not write to the array again, and would use the same item of the
iterator for ever.
"""

from __future__ import annotations

import array
import copy
import itertools
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import NotFittingError
from .snapshots import MAX_ARRAY_BYTES

_ARRAYS = (np.ndarray, array.array, bytearray)
_ITERATORS_OF = ("builtins", "itertools")
_MAX_PARTS = 8  # longer tuples are data, not the parts of an iterator
_MAX_DEPTH = 4  # of iterators within iterators


@dataclass(frozen=True, slots=True)
class _Met:
    path: str
    value: Any
    state: Any


class WrittenInPlace:
    """Arrays and iterators that a step has met, as recorded then."""

    def __init__(self) -> None:
        self._arrays: dict[int, _Met] = {}
        self._iterators: dict[int, _Met] = {}

    def meet(self, value: Any, path: str) -> None:
        """Remember the contents of a value if it is an array or an iterator."""
        if isinstance(value, _ARRAYS):
            if id(value) not in self._arrays and _num_bytes(value) <= MAX_ARRAY_BYTES:
                self._arrays[id(value)] = _Met(path, value, copy.copy(value))
        elif _is_iterator(value) and id(value) not in self._iterators:
            self._iterators[id(value)] = _Met(path, value, _state_of(value))

    def refuse_changes(self) -> None:
        """Refuse a step that wrote to an array or advanced an iterator.

        Raises
        ------
        NotFittingError
            Names the first one.
        """
        for met in self._arrays.values():
            if not _same_numbers(met.value, met.state):
                raise NotFittingError(
                    f"forward writes to {met.path!r}, a {type(met.value).__name__}, which a "
                    "planned step would not do; keep the numbers in a buffer, or write them in "
                    "the training loop"
                )
        for met in self._iterators.values():
            if _state_of(met.value) != met.state:
                raise NotFittingError(
                    f"forward advances {met.path!r}, a {type(met.value).__name__}: a plan would "
                    "repeat what this one call got from it for ever; advance it in the training "
                    "loop and pass what it gives as an argument"
                )

    def put_back(self) -> None:
        """Undo writes; of iterators, only those over sequences can be set back."""
        for met in self._arrays.values():
            if _same_numbers(met.value, met.state):
                continue
            if isinstance(met.value, np.ndarray):
                met.value[...] = met.state
            else:
                met.value[:] = met.state
        for met in self._iterators.values():
            at = met.state[-1] if isinstance(met.state, tuple) and met.state else None
            settable = isinstance(at, int) and hasattr(met.value, "__setstate__")
            if settable and _state_of(met.value) != met.state:
                met.value.__setstate__(at)


def _num_bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes


def _same_numbers(now: Any, then: Any) -> bool:
    if isinstance(now, np.ndarray):
        return now.shape == then.shape and now.tobytes() == then.tobytes()
    return bool(now == then)


def _is_iterator(value: Any) -> bool:
    return type(value).__module__ in _ITERATORS_OF and isinstance(value, Iterator)


def _state_of(iterator: Any, depth: int = 0) -> Any:
    """A state that differs once the iterator was advanced; reading it does not advance it."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        if frame is None:
            return "exhausted"
        return frame.f_lasti, tuple((name, id(held)) for name, held in frame.f_locals.items())
    if isinstance(iterator, itertools.count):
        return repr(iterator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for copying iterators of itertools
        try:
            parts = iterator.__reduce__()
        except TypeError:  # a file, or another iterator that cannot be copied
            return None
    return _parts(parts, depth)


def _parts(value: Any, depth: int) -> Any:
    if _is_iterator(value) and depth < _MAX_DEPTH:
        return _state_of(value, depth + 1)
    if isinstance(value, tuple) and len(value) <= _MAX_PARTS:
        return tuple(_parts(item, depth) for item in value)
    if isinstance(value, (int, type(None))):
        return value
    # The remaining items are a new object on each look, so only their number counts.
    return len(value) if isinstance(value, (list, tuple)) else id(value)


__all__ = ["WrittenInPlace"]
