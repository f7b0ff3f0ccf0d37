"""Compare a module's calls with the planned one, fast enough to do it in every step."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from operator import attrgetter, call, is_
from typing import Any

import torch
from torch import nn

from graph_capture.calls.argument_memory import argument_bytes
from graph_capture.calls.call_spec import describe, difference
from graph_capture.private_torch.modules import buffers_of, parameters_of
from graph_capture.private_torch.tensors import identity_of_storage

from ..base.call_guard import (
    CallGuard,
    autocast_dtype,
    lazy_input,
)

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_NUM_REMEMBERED = 64
_REQUIRES_GRAD = attrgetter("requires_grad")
_TRAINING = attrgetter("training")


class LiveGuard:
    """What a call and a module's state must be for a plan to be valid.

    The first call of a kind is compared in full; a call known to match is then
    recognized by its tensors' metadata. Parameters and buffers are checked again where
    one of them is another object or has moved in memory.

    Parameters
    ----------
    guard
        The planned call.
    model
        Must still be built the same way.
    device_type
        Whose autocast counts.
    signature
        Signature of the model's own forward, whose defaults belong to the call.
    """

    def __init__(
        self, guard: CallGuard, model: nn.Module, device_type: str, signature: inspect.Signature
    ) -> None:
        self._defaults = described_defaults(signature)
        self._guard = replace(guard, arguments={**self._defaults, **guard.arguments})
        self._model = model
        self._device_type = device_type
        self._known_calls: set[Any] = set()
        evaluating = set(guard.evaluating)
        named = list(model.named_modules())
        self._modules = [module for _, module in named]
        self._training = [name not in evaluating for name, _ in named]
        self._tables = [
            table for m in self._modules for table in (parameters_of(m), buffers_of(m)) if table
        ]
        self._tensors: list[Callable[[], torch.Tensor | None]] = []
        self._places: tuple[list[bool], list[int]] = ([], [])
        self.replaced_bytes = 0
        """Of parameters that others took the place of, while they are in memory."""
        self.uncounted_bytes = 0
        """What the tensors of a call were found to keep alive beyond what the plan counts."""

    def difference(self, arguments: Mapping[str, Any], looks: Any) -> str | None:
        """Describe the first difference between a call and the planned one."""
        return self.another_call(arguments, looks) or self.another_state()

    def difference_now(self) -> str | None:
        """Like :meth:`difference`, but only for training flags, parameters and buffers.

        The active autocast does not count: a backward pass runs outside of it.
        """
        return None if self._is_as_seen() else self._state_difference(self._guard.autocast)

    # -- the call ----------------------------------------------------------------

    def knows(self, looks: Any) -> bool:
        """Whether a call that looks like this was found to be the planned one before."""
        return looks is not None and looks in self._known_calls

    def another_call(self, arguments: Mapping[str, Any], looks: Any) -> str | None:
        """Describe how a call's arguments differ from the planned ones.

        Parameters
        ----------
        looks
            The call's :func:`looks_of`.
        """
        if looks is not None and looks in self._known_calls:
            return None
        arguments = {**self._defaults, **arguments}
        found = difference(self._guard.arguments, describe(arguments)) or lazy_input(arguments)
        if found is None:
            self._count(arguments)
        if found is None and looks is not None and len(self._known_calls) < _NUM_REMEMBERED:
            self._known_calls.add(looks)
        return found

    def _count(self, arguments: Mapping[str, Any]) -> None:
        now = replace(
            self._guard,
            arguments=describe(arguments),
            argument_bytes=argument_bytes(self._model, arguments),
        )
        beyond = now.held_by_call - self._guard.held_by_call
        self.uncounted_bytes = max(self.uncounted_bytes, beyond)

    # -- the state ---------------------------------------------------------------

    def another_state(self) -> str | None:
        """Describe how autocast, training flags, parameters or buffers differ."""
        autocast = autocast_dtype(self._device_type)
        if autocast == self._guard.autocast and self._is_as_seen():
            return None
        return self._state_difference(autocast)

    def _state_difference(self, autocast: str | None) -> str | None:
        now = replace(CallGuard.of(self._model, {}, self._device_type), autocast=autocast)
        planned = self._guard.state
        known = {name: spec for name, spec in now.state.items() if name in planned}
        found = replace(self._guard, arguments={}).difference_to(replace(now, state=known))
        if found is None:
            self._see()
        return found

    def _is_as_seen(self) -> bool:
        if list(map(_TRAINING, self._modules)) != self._training:
            return False
        tensors = list(chain.from_iterable(map(dict.values, self._tables)))
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, map(call, self._tensors)))
            and _places(tensors) == self._places
        )

    def _see(self) -> None:
        tensors = list(chain.from_iterable(map(dict.values, self._tables)))
        there = {t.data_ptr() for t in tensors if t is not None}
        # Forward itself may replace buffers, which the plan counts.
        before = [t for t in map(call, self._tensors) if isinstance(t, nn.Parameter)]
        left = {t.data_ptr(): t.untyped_storage().nbytes() for t in before}
        self.replaced_bytes = sum(left[at] for at in left.keys() - there)
        self._tensors = [_nothing if t is None else weakref.ref(t) for t in tensors]
        self._places = _places(tensors)


def described_defaults(signature: inspect.Signature) -> dict[str, Any]:
    """Return the defaults of arguments that a call may leave out, by name."""
    of_kind: dict[Any, Any] = {
        inspect.Parameter.VAR_POSITIONAL: (),
        inspect.Parameter.VAR_KEYWORD: {},
    }
    return {
        name: describe(of_kind.get(parameter.kind, parameter.default))
        for name, parameter in signature.parameters.items()
        if parameter.kind in of_kind or parameter.default is not parameter.empty
    }


def _nothing() -> None:
    """Stand in for a weak reference to a parameter or buffer that is ``None``."""


def _places(tensors: list[torch.Tensor | None]) -> tuple[list[bool], list[int]]:
    """Return what changes when a tensor object gets other contents or stops requiring grad."""
    there = [t for t in tensors if t is not None]
    return list(map(_REQUIRES_GRAD, there)), list(map(torch.Tensor.data_ptr, there))


def looks_of(value: Any, memories: dict[int, int] | None = None) -> Any:
    """Return a hashable view of a call, as its guard sees it; ``None`` where it holds another
    kind of object.

    Parameters
    ----------
    memories
        Numbers of the memories that the tensors seen so far lie in.
    """
    memories = {} if memories is None else memories
    if isinstance(value, torch.Tensor):
        return (
            value.shape,
            value.stride(),
            value.dtype,
            value.device,
            value.requires_grad,
            value.is_conj(),
            value.is_neg(),
            _memory_of(value, memories),
        )
    if isinstance(value, float):
        return type(value), value.hex()  # which tells -0.0 from 0.0
    if isinstance(value, _PLAIN):
        return type(value), value
    items: Any
    if isinstance(value, Mapping):
        items = value.items() if all(isinstance(key, str) for key in value) else None
    elif type(value) in (tuple, list):
        items = enumerate(value)
    else:
        items = None
    if items is None:
        return None
    looks: list[Any] = [type(value)]
    for key, item in items:
        found = looks_of(item, memories)
        if found is None:
            return None
        looks.append((key, found))
    return tuple(looks)


def _memory_of(tensor: torch.Tensor, memories: dict[int, int]) -> tuple[int, int] | None:
    """Return how large the memory is that a tensor keeps, and which of a call's it is."""
    try:
        memory = tensor.untyped_storage()
    except NotImplementedError:  # sparse, or batched by vmap
        return None
    return memory.nbytes(), memories.setdefault(identity_of_storage(memory), len(memories))
