"""Values known before a step runs, because they are made of constants only.

Eager code branches on them: Transformers asks whether the positions that it has
just counted are those of packed sequences. A capture must take the branch that
eager takes. So the results of factories such as ``arange``, and what is computed
from these alone, are computed for real beside their stand-ins, as long as they are
small.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..private_torch.aten import local_scalar_dense
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.fake_tensors import FakeTensor
from ..private_torch.operators import schema_of
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter, tree_map
from .asked_numbers import AskedNumber
from .outcomes import (
    ASKS,
    GivenOutcomes,
    Outcome,
    ReadsWhole,
    made_like,
    read_like,
)

MAX_ELEMENTS = 1 << 20

_FACTORIES = {
    "aten::arange",
    "aten::eye",
    "aten::full",
    "aten::linspace",
    "aten::ones",
    "aten::scalar_tensor",
    "aten::zeros",
}
_item = local_scalar_dense.default


class ConstantValues:
    """Real values of some of the stand-ins of one capture.

    Parameters of its methods are those of ``__torch_dispatch__``. Stand-ins must
    outlive this object: they are recognized by their identity, and by the memory
    that they had when their value was found (``x.data = …`` replaces it).
    """

    def __init__(self) -> None:
        self._value_of: dict[int, torch.Tensor] = {}
        self._memory_of: dict[int, int] = {}
        self._in_memory: dict[int, list[int]] = {}  # storage -> stand-ins of it that are known

    def copy(self) -> ConstantValues:
        """Return an independent copy with the same values."""
        twin = ConstantValues()
        twin._value_of = dict(self._value_of)
        twin._memory_of = dict(self._memory_of)
        twin._in_memory = {memory: list(ids) for memory, ids in self._in_memory.items()}
        return twin

    def answers(self, func: Any, args: tuple) -> bool:
        """Whether the call reads a number out of a known tensor."""
        return func is _item and self._knows(args[0])

    def _knows(self, tensor: torch.Tensor) -> bool:
        value = self._value_of.get(id(tensor))
        return (
            value is not None
            and self._memory_of[id(tensor)] == identity_of_storage(tensor.untyped_storage())
            and (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
        )

    def number(self, args: tuple) -> Any:
        """Return that number."""
        with disable_current_modes():
            return self._value_of[id(args[0])].item()

    def value_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the value of a tensor, if it is known."""
        return self._value_of[id(tensor)] if self._knows(tensor) else None

    def note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Compute the result of a call if everything that it reads is known."""
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if schema_of(func).is_mutable:
            self._forget(given)
        elif isinstance(out, FakeTensor) and out.numel() <= MAX_ELEMENTS:
            if given:
                follows = _is_pure(func) and all(self._knows(t) for t in given)
            else:
                follows = schema_of(func).name in _FACTORIES
            if follows:
                self._compute(func, args, kwargs, out)

    def _forget(self, written: list[torch.Tensor]) -> None:
        for tensor in written:
            self._value_of.pop(id(tensor), None)
            for known in self._in_memory.pop(identity_of_storage(tensor.untyped_storage()), ()):
                self._value_of.pop(known, None)

    def _compute(self, func: Any, args: tuple, kwargs: dict, out: FakeTensor) -> None:
        def real(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return self._value_of[id(x)]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        with disable_current_modes(), torch.no_grad():
            try:
                value = func(*tree_map(real, args), **tree_map(real, kwargs))
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
                return  # not known; the CPU may lack this kernel
        memory = identity_of_storage(out.untyped_storage())
        self._value_of[id(out)] = value
        self._memory_of[id(out)] = memory
        self._in_memory.setdefault(memory, []).append(id(out))


class ReplayAnswersMode(ReadsWhole):
    """Answers requests for values as a recorder did, without recording anything.

    Parameters
    ----------
    known
        What is known at the start.
    outcomes
        What the recorder answered where it asked the sample.
    unknown
        For each number that the recorder returned, whether its value differs from step to step.
    """

    def __init__(
        self, known: ConstantValues, outcomes: Sequence[Outcome] = (), unknown: Sequence[bool] = ()
    ) -> None:
        super().__init__()
        self._unknown = iter(unknown)
        self._known = known
        self._given = GivenOutcomes(outcomes)
        self._keep_alive: list[Any] = []  # known by their identity

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._known.answers(func, args):
            return self._known.number(args)
        try:
            out = func(*args, **kwargs)
        except ASKS:
            outcome = self._given.of_call(func, "in a second forward")
            if outcome.made is None:
                return outcome.number
            out = made_like(outcome, func, args)
        self._keep_alive.append(out)
        self._known.note(func, args, kwargs, out)
        return out

    def asked_number(self, tensor: torch.Tensor) -> AskedNumber | None:
        """Return a number as the recorder returned it."""
        if tensor.dtype == torch.bool or tensor.is_complex() or self._knows(tensor):
            return None
        return AskedNumber(tensor, unknown=next(self._unknown, False))

    def _knows(self, tensor: torch.Tensor) -> bool:
        return self._known.value_of(tensor) is not None

    def read_whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return all values of a stand-in, as the recorder read them."""
        known = self._known.value_of(tensor)
        if known is not None:
            return known
        return read_like(self._given.of_reading(tensor, "in a second forward"), tensor)


def _is_pure(func: Any) -> bool:
    """Whether a call computes its result from its arguments, and does nothing else.

    Other libraries' operators never count as pure: they may talk to other machines.
    """
    return (
        func.namespace == "aten"
        and torch.Tag.nondeterministic_seeded not in func.tags
        and "empty" not in schema_of(func).name
    )


@contextmanager
def disguise_fake_tensors() -> Iterator[None]:
    """While active, Transformers does not recognize stand-ins as such.

    Transformers avoids branches on values if a tensor is fake. If the value is
    known, eager's branch is the right one.
    """
    library: Any = sys.modules.get("transformers.utils.import_utils")
    before = getattr(library, "is_fake_tensor", None)
    if before is None:
        yield
        return
    library.is_fake_tensor = lambda _tensor: False
    try:
        yield
    finally:
        library.is_fake_tensor = before


__all__ = ["ReplayAnswersMode", "ConstantValues", "disguise_fake_tensors"]
