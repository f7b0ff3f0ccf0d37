"""Snapshots of places: plain values by value, containers by content, the rest by identity.

A snapshot keeps no tensor and no module alive: it holds weak references to them.
"""

from __future__ import annotations

import array
import contextvars
import ctypes
import enum
import functools
import gc
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from multiprocessing.sharedctypes import SynchronizedBase
from operator import is_
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from ..calls.call_spec import TensorSpec
from ..private_torch.operators import OpOverload, OpOverloadPacket

ABSENT: Any = type("_Absent", (), {"__repr__": lambda _self: "not there"})()
"""Stands for the value of an empty place."""

BY_VALUE = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.Size,
    slice,
    range,
    np.generic,
    Fraction,
    Decimal,
    PurePath,
)
_BY_IDENTITY = (
    type,
    enum.Enum,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    property,
    staticmethod,
    classmethod,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    OpOverload,
    OpOverloadPacket,
)
ATOMS = (*BY_VALUE, *_BY_IDENTITY)
SEQUENCES = (list, tuple, deque)
CONTAINERS = (*SEQUENCES, dict, set, frozenset)
MAX_ITEMS = 10_000
"""For containers with more items than this, only the number of items is compared."""
MAX_ARRAY_BYTES = 2**26
"""Larger arrays are not read in every step: that would take more than some ten milliseconds."""
_CHUNK_BYTES = 2**20  # fits into a cache
_C_DATA = ctypes.Array.__mro__[1]  # the base of all of ctypes' types has no public name
_ARRAYS = (np.ndarray, bytearray, array.array, memoryview, _C_DATA)
WRAPPERS = (
    functools.partial,
    types.MappingProxyType,
    contextvars.ContextVar,
    threading.local,
    weakref.ref,
    weakref.WeakKeyDictionary,
    weakref.WeakSet,
    weakref.WeakValueDictionary,
    SynchronizedBase,
)
"""Objects that are compared by their parts, see :func:`parts_of`."""
_MAX_DEPTH = 20


@dataclass(frozen=True, slots=True)
class Atom:
    """An immutable value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Content:
    """A container with its contents.

    Parameters
    ----------
    keys
        Indices for a sequence, elements for a set.
    items
        ``None`` if there are too many; ``keys`` is then their number.
    container
        The container itself, if the snapshot is to keep it alive.
    """

    type: type
    keys: tuple[Any, ...]
    items: tuple[Snapshot, ...] | None
    container: Any = None


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor; ``reference`` is ``None`` if another one may take its place."""

    spec: TensorSpec
    reference: weakref.ref[torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Thing:
    """Some other object, compared by identity; a weak reference, by its type only."""

    type: type
    reference: Callable[[], Any] | None


@dataclass(frozen=True, slots=True)
class Numbers:
    """An array or a buffer of bytes with its contents.

    Parameters
    ----------
    looks
        Its shape and dtype, for a NumPy array.
    held
        Its bytes; ``None`` if there are more than :data:`MAX_ARRAY_BYTES`.
    array
        The array itself, if the snapshot is to keep it alive.
    """

    type: type
    reference: Callable[[], Any] | None
    looks: Any
    held: bytes | None
    array: Any = None

    def unchanged(self) -> bool:
        """Whether the array that the snapshot keeps still has the same contents."""
        return _looks_of_array(self.array) == self.looks and (
            self.held is None or _holds(self.array, self.held)
        )

    def is_too_large(self) -> bool:
        """Whether it is left out of the comparison only because of its size."""
        return self.held is None and not _has_objects(self.looks)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """An object that stands for others: a partial function, a view of a dict.

    Parameters
    ----------
    inner
        A snapshot of its parts.
    wrapper, parts
        The wrapper and its parts, if the snapshot is to keep them alive.
    """

    type: type
    reference: Callable[[], Any] | None
    inner: Snapshot
    wrapper: Any = None
    parts: tuple[Any, ...] = ()

    def unchanged(self) -> bool:
        """Whether the wrapper that the snapshot keeps still has the same parts."""
        now = parts_of(self.wrapper)
        same = map(is_, now, self.parts)
        if isinstance(self.wrapper, weakref.ref):
            return now == self.parts
        return len(now) == len(self.parts) and all(same)


Snapshot = Atom | Content | Held | Thing | Numbers | Wrapped


def parts_of(wrapper: Any) -> tuple[Any, ...]:
    """The parts of one of :data:`WRAPPERS`."""
    if isinstance(wrapper, functools.partial):
        return wrapper.func, wrapper.args, wrapper.keywords
    if isinstance(wrapper, contextvars.ContextVar):
        return (wrapper.get(ABSENT),)
    if isinstance(wrapper, weakref.ref):
        value = wrapper()
        return (ABSENT if value is None else f"an object at {id(value):#x}",)
    if isinstance(wrapper, threading.local):
        return (wrapper.__dict__,)
    if isinstance(wrapper, types.MappingProxyType):
        return tuple(gc.get_referents(wrapper))  # it has no attribute for the dict behind it
    return (wrapper.get_obj() if isinstance(wrapper, SynchronizedBase) else wrapper.data,)


def snapshot(
    value: Any, *, replaceable: bool = False, keep: bool = False, depth: int = 0
) -> Snapshot:
    """Take a snapshot of a place's contents.

    Parameters
    ----------
    replaceable
        Whether a tensor in it may be replaced by another of the same kind.
    keep
        Whether to keep its containers alive.
    """
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            return Thing(type(value), weakref.ref(value))
        return Held(TensorSpec.of(value), None if replaceable else weakref.ref(value))
    if isinstance(value, ATOMS) or value is ABSENT:
        return Atom(value)
    if isinstance(value, _ARRAYS):
        few = _num_bytes(value) <= MAX_ARRAY_BYTES
        return Numbers(
            type(value),
            _reference(value),
            _looks_of_array(value),
            _bytes_of(value) if few else None,
            value if keep else None,
        )
    if isinstance(value, weakref.ref) and isinstance(value(), torch.Tensor):
        return Thing(type(value), None)  # a capture has stand-ins, as nn.LSTM's references show
    if isinstance(value, WRAPPERS) and depth < _MAX_DEPTH:
        parts = parts_of(value)
        return Wrapped(
            type(value),
            _reference(value),
            snapshot(parts, keep=keep, depth=depth + 1),
            value if keep else None,
            parts if keep else (),
        )
    if isinstance(value, CONTAINERS):
        return _content(value, keep, depth)
    return Thing(type(value), _reference(value))


def _looks_of_array(value: Any) -> Any:
    if isinstance(value, (np.ndarray, memoryview)):
        return value.shape, value.dtype if isinstance(value, np.ndarray) else value.format
    return _num_bytes(value) if isinstance(value, _C_DATA) else len(value)


def _num_bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes


def _bytes_of(value: Any) -> bytes | None:
    """The bytes of an array; ``None`` for one of Python objects, whose bytes are addresses."""
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return None
    return value.tobytes() if isinstance(value, np.ndarray) else bytes(memoryview(value))


def _has_objects(looks: Any) -> bool:
    return isinstance(looks, tuple) and bool(getattr(looks[1], "hasobject", False))


def _holds(value: Any, then: bytes) -> bool:
    """Whether an array holds these bytes; compares all of them without a copy."""
    if not isinstance(value, np.ndarray) or not value.flags.c_contiguous or not then:
        return _bytes_of(value) == then
    now, before = value.reshape(-1).view(np.uint8), np.frombuffer(then, np.uint8)
    if now.nbytes != before.nbytes:
        return False
    if now.nbytes % 8 == 0 and value.flags.aligned:
        now, before = now.view(np.uint64), before.view(np.uint64)
    step = _CHUNK_BYTES // now.itemsize
    return all(
        np.array_equal(now[i : i + step], before[i : i + step]) for i in range(0, len(now), step)
    )


def _content(value: Any, keep: bool, depth: int) -> Snapshot:
    itself = value if keep else None
    count = size_of(value)
    if count > MAX_ITEMS or depth >= _MAX_DEPTH:
        return Content(type(value), (count,), None, itself)
    if isinstance(value, (set, frozenset)):
        return Content(type(value), tuple(_kind(value).__iter__(value)), (), itself)
    items = tuple(snapshot(item, keep=keep, depth=depth + 1) for _, item in entries_of(value))
    return Content(type(value), tuple(key for key, _ in entries_of(value)), items, itself)


def entries_of(value: Any) -> Iterable[tuple[Any, Any]]:
    """Keys and values of a dict, indices and items of a sequence."""
    # Past what a subclass overrides. An OrderedDict has an order that a plain dict does not see.
    if isinstance(value, OrderedDict):
        return OrderedDict.items(value)
    if isinstance(value, dict):
        return dict.items(value)
    return enumerate(_kind(value).__iter__(value))


def size_of(value: Any) -> int:
    """Return how many items a container has, past what a subclass overrides."""
    return int(_kind(value).__len__(value))


def _kind(value: Any) -> Any:
    """The class of Python's own that a container belongs to."""
    return next(kind for kind in CONTAINERS if isinstance(value, kind))


def _reference(value: Any) -> Callable[[], Any] | None:
    if isinstance(value, weakref.ref):
        return None
    try:
        return weakref.ref(value)
    except TypeError:  # for example a class with slots
        return lambda: value


def difference(then: Snapshot, now: Any, label: str) -> str | None:
    """Describe the first change; ``None`` if there is none."""
    if isinstance(then, Atom):
        return None if same_atom(then.value, now) else f"{label} is {brief(now)}, {was(then.value)}"
    if isinstance(then, Held):
        return _tensor_difference(then, now, label)
    if isinstance(then, Thing):
        if type(now) is not then.type or (then.reference and then.reference() is not now):
            return f"{label} is {brief(now)}, was another {then.type.__name__} while planning"
        return None
    if isinstance(then, Numbers):
        if type(now) is not then.type or _looks_of_array(now) != then.looks:
            return f"{label} is {brief(now)}, was another {then.type.__name__} while planning"
        if then.held is None:
            same = then.reference is None or then.reference() is now
        else:
            same = _holds(now, then.held)
        return None if same else f"{label} holds other numbers than while planning"
    if isinstance(then, Wrapped):
        if type(now) is not then.type:
            return f"{label} is {brief(now)}, was a {then.type.__name__} while planning"
        return difference(then.inner, parts_of(now), f"{label} (its parts)")
    if type(now) is not then.type or not isinstance(now, CONTAINERS):
        return f"{label} is {brief(now)}, was a {then.type.__name__} while planning"
    if then.items is None:
        (count,) = then.keys
        has = size_of(now)
        return None if has == count else f"{label} has {has} items, {was(count)}"
    if isinstance(now, (set, frozenset)):
        return None if now == set(then.keys) else f"{label} is {brief(now)}, {was(then.keys)}"
    keys = tuple(key for key, _ in entries_of(now))
    if keys != then.keys:
        return f"{label} has {_count(keys)}, had {_count(then.keys)} while planning"
    for (key, value), item in zip(entries_of(now), then.items, strict=True):
        found = difference(item, value, f"{label}[{key!r}]")
        if found:
            return found
    return None


def _tensor_difference(then: Held, now: Any, label: str) -> str | None:
    if not isinstance(now, torch.Tensor):
        return f"{label} is {brief(now)}, was a tensor while planning"
    if now.layout != torch.strided:
        return f"{label} is a tensor of layout {now.layout}, was a dense one while planning"
    spec = TensorSpec.of(now)
    if spec != then.spec:
        also = "" if str(spec) != str(then.spec) else f" with strides {spec.stride}"
        return f"{label} is {spec}{also}, was {then.spec} while planning"
    if then.reference and then.reference() is not now:
        return f"{label} is another tensor than while planning"
    return None


def same_atom(then: Any, now: Any) -> bool:
    """Whether two plain values are the same, in type as well: 1 is neither 1.0 nor True."""
    if then is now:
        return True
    if type(then) is not type(now) or not isinstance(then, (*BY_VALUE, torch.device)):
        # A bound method is a new object on each access.
        return isinstance(then, types.MethodType) and then == now
    if isinstance(then, (float, complex, np.generic, Decimal)):
        return repr(then) == repr(now)  # 0.0 is not -0.0, and nan is nan
    return bool(then == now)


def looked_at_in(value: Snapshot) -> Iterator[Numbers | Wrapped]:
    """Every array and wrapper in a snapshot that keeps them."""
    if isinstance(value, Numbers):
        yield value
    elif isinstance(value, Wrapped):
        yield value
        yield from looked_at_in(value.inner)
    elif isinstance(value, Content):
        for item in value.items or ():
            yield from looked_at_in(item)


def contents_in(value: Snapshot) -> Iterator[Content]:
    """Every container in a snapshot that keeps them."""
    if isinstance(value, Wrapped):
        yield from contents_in(value.inner)
    elif isinstance(value, Content):
        yield value
        for item in value.items or ():
            yield from contents_in(item)


def brief(value: Any) -> str:
    """Describe a value briefly."""
    if isinstance(value, torch.Tensor):
        return f"a tensor ({TensorSpec.of(value)})" if value.layout == torch.strided else "a tensor"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return str(getattr(value, "__qualname__", value))
    if value is ABSENT or isinstance(value, (*ATOMS, *CONTAINERS)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def was(value: Any) -> str:
    """The end of a sentence about a change."""
    return f"was {brief(value)} while planning"


def _count(keys: tuple[Any, ...]) -> str:
    named = any(not isinstance(key, int) for key in keys)
    return f"keys {brief(list(keys))}" if named else f"{len(keys)} items"
