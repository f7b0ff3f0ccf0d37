"""Run code of a training loop ahead of time, and undo what it did.

A loss that is computed while planning may count steps, average weights or statistics, collect
metrics, draw from a generator of its own. The loop will do all of that itself.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ..calls.storage_id import bytes_in
from ..calls.writes import hidden_writes, written_arguments
from ..errors import NotFittingError
from ..private_torch.dispatch import TorchDispatchMode, disable_current_modes
from ..private_torch.fake_tensors import FakeTensor
from ..private_torch.operators import OpOverload
from ..private_torch.tensors import identity_of_storage
from .foreign_generators import ForeignGenerators
from .holders import dict_of
from .isolation import generator_states, set_generator_states
from .ledger import Ledger, slots_of
from .named_reads import (
    is_library,
    is_users,
    is_users_class,
    is_users_file,
    is_users_own,
    names_in,
    stored_in,
)

MAX_ITEMS = 10_000
"""Longer containers hold data, and what is in them is not looked into."""

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_PLAIN = frozenset((bool, int, float, complex, str, bytes, types.NoneType))  # lead nowhere
_NUM_YIELDED = "_num_yielded"  # of a DataLoader's iterator
_DATA = (Dataset, DataLoader, Sampler)


@contextmanager
def undone(*roots: Any) -> Iterator[None]:
    """Afterwards everything that ``roots`` lead to is as before, tensors included.

    From an object or a function they lead to attributes, closures and globals, in as far as
    these are the user's or modules; tensors are found as they are written to.

    Raises
    ------
    NotFittingError
        When the code took from an iterator, which cannot be set back.
    """
    found = _Found()
    for root in roots:
        found.look(root, type(root).__name__, is_root=True)
    written = _Written()
    try:
        with written:
            yield
    finally:
        written.put_back()
        found.put_back()
    found.refuse_lost_items()


class _Written(TorchDispatchMode):
    """Keeps what real memory held before a call writes to it, in memory of the host."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[torch.UntypedStorage, np.ndarray]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            for tensor in (*written_arguments(func, args, kwargs), *hidden_writes(func, args)):
                self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
            return
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if identity_of_storage(storage) not in self._before:
            with disable_current_modes():
                there = bytes_in(storage).cpu().numpy().copy()
            self._before[identity_of_storage(storage)] = storage, there

    def put_back(self) -> None:
        """Write back what has changed, past the counters of autograd."""
        with disable_current_modes(), torch.no_grad():
            for storage, before in self._before.values():
                if storage.nbytes() == before.nbytes:
                    bytes_in(storage).copy_(torch.from_numpy(before))


class _Found:
    """What objects and functions lead to, with its state at the time."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._foreign = ForeignGenerators()
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._given_out: list[tuple[str, Any, Any]] = []
        self._seen: dict[int, Any] = {}
        with disable_current_modes():
            self._states = generator_states()
        self._pythons, self._numpys = random.getstate(), np.random.get_state()

    def look(self, value: Any, path: str, *, is_root: bool = False) -> None:
        """Record a value, and what it leads to."""
        todo = deque([(value, path)])
        while todo:
            value, path = todo.popleft()
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            todo.extend(self._into(value, path, is_root))
            is_root = False

    def put_back(self) -> None:
        """Undo what can be undone."""
        self._ledger.put_back()
        self._foreign.put_back()
        random.setstate(self._pythons)
        np.random.set_state(self._numpys)
        with disable_current_modes():
            set_generator_states(self._states)
            for generator, state in self._generators:
                generator.set_state(state)

    def refuse_lost_items(self) -> None:
        """Refuse where an iterator has given out what the loop will miss."""
        for path, iterator, before in self._given_out:
            if _position(iterator) != before:
                raise NotFittingError(
                    f"the loss takes items from {path!r}, a {type(iterator).__name__}, and so "
                    "would have while it was planned, which the training would miss: fetch them "
                    "with the batch, or pass a loss_fn= that takes none"
                )
        try:
            self._foreign.refuse_draws()
        except NotFittingError as error:
            raise NotFittingError(
                f"the loss was computed while planning, and cannot be undone: {error}"
            ) from error

    def _into(self, value: Any, path: str, is_root: bool) -> Iterator[tuple[Any, str]]:
        if isinstance(value, (torch.Tensor, types.ModuleType, *_DATA)):
            return
        if isinstance(value, torch.Generator):
            with disable_current_modes():
                self._generators.append((value, value.get_state()))
        elif _gives_out(value):
            self._given_out.append((path, value, _position(value)))
        elif isinstance(value, _CONTAINERS):
            self._ledger.contents(value, path)
            if len(value) <= MAX_ITEMS:
                items = list(value.values() if isinstance(value, dict) else value)
                yield from ((item, path) for item in items if type(item) not in _PLAIN)
        elif isinstance(value, types.MethodType):
            yield from ((value.__self__, path), (value.__func__, value.__func__.__name__))
        elif isinstance(value, functools.partial):
            yield from ((part, path) for part in (value.func, value.args, value.keywords))
        elif isinstance(value, types.FunctionType):
            yield from self._named_in(value)
        elif isinstance(value, type):
            if _is_users(value):
                self._ledger.names(value, value.__name__)
                yield from ((v, f"{value.__name__}.{k}") for k, v in list(vars(value).items()))
        elif is_root or isinstance(value, nn.Module) or _is_users(type(value)):
            self._ledger.attributes(value, path)
            own = {**dict_of(value), **slots_of(value)}
            yield from ((v, f"{path}.{k}") for k, v in own.items())
            yield from ((cls, cls.__name__) for cls in type(value).__mro__)
        else:
            self._foreign.meet(value, path)

    def _named_in(self, function: types.FunctionType) -> Iterator[tuple[Any, str]]:
        code = function.__code__
        if not is_users(code) or is_library(code):
            return
        yield from ((default, function.__name__) for default in function.__defaults__ or ())
        stored = stored_in(code)
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        for _, name, _ in names_in(code):
            if name in cells:
                if name in stored:
                    self._ledger.slot(cells[name], "cell_contents", name)
                try:
                    yield cells[name].cell_contents, name
                except ValueError:  # empty
                    continue
            elif name in function.__globals__:
                if name in stored:
                    self._ledger.slot(function.__globals__, name, name)
                yield function.__globals__[name], name


def _is_users(cls: type) -> bool:
    """Whether a class is of no package, this one included."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return is_users_class(cls) and is_users_own(cls) and (file is None or is_users_file(file))


def _gives_out(value: Any) -> bool:
    return isinstance(value, types.GeneratorType) or _NUM_YIELDED in dict_of(value)


def _position(iterator: Any) -> Any:
    if not isinstance(iterator, types.GeneratorType):
        return dict_of(iterator)[_NUM_YIELDED]
    frame = iterator.gi_frame
    if frame is None:
        return None
    return frame.f_lasti, {name: id(value) for name, value in frame.f_locals.items()}


__all__ = ["undone"]
