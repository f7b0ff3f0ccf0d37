"""The answers a step's code received when it read values of tensors, in order.

A plan follows the branches and sizes that these answers led to. A plan file holds
them, so that the step can be captured again without a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..calls.call_spec import TensorSpec, from_json, to_json
from ..errors import NotFittingError
from ..private_torch.dispatch import (
    TorchDispatchMode,
    current_dispatch_modes,
    disable_current_modes,
)
from ..private_torch.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from ..private_torch.operators import schema_of
from ..private_torch.trees import tree_iter
from .asked_numbers import AskedNumber

ASKS = (DataDependentOutputException, DynamicOutputShapeException)
"""What fake tensors raise when their value is asked for."""

Number = bool | int | float | complex


class OutcomeMismatchError(NotFittingError):
    """The step reads other values than when its plan was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One answer; exactly one of the three fields is set.

    Parameters
    ----------
    number
        The result of a call that returns a number, such as ``.item()``.
    made
        The kinds of tensors that a call returned whose shapes depend on values.
    values
        All elements of a tensor that was read as a whole (``.tolist()``), in
        order.
    """

    number: Number | None = None
    made: tuple[TensorSpec, ...] | None = None
    values: tuple[Number, ...] | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.number, self.made, self.values)) != 1:
            raise ValueError("an outcome is a number, the kinds of tensors made, or values read")

    @classmethod
    def of(cls, result: Any) -> Outcome:
        """Return the outcome of a call that returned ``result``."""
        if isinstance(result, torch.Tensor):
            return cls(made=(TensorSpec.of(result),))
        if isinstance(result, (tuple, list)):
            return cls(made=tuple(TensorSpec.of(t) for t in result))
        return cls(number=result)

    @classmethod
    def read(cls, tensor: torch.Tensor) -> Outcome:
        """Return the outcome of reading a real tensor as a whole."""
        with disable_current_modes():
            return cls(values=tuple(tensor.flatten().tolist()))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; NaN and infinities are named."""
        if self.number is not None:
            return {"number": _number_to_json(self.number)}
        if self.made is not None:
            return {"made": [to_json(spec) for spec in self.made]}
        assert self.values is not None
        return {"values": [_number_to_json(x) for x in self.values]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Invert :meth:`to_json`."""
        if "number" in data:
            return cls(number=_number_from_json(data["number"]))
        if "made" in data:
            return cls(made=tuple(from_json(spec) for spec in data["made"]))
        return cls(values=tuple(_number_from_json(x) for x in data["values"]))


class GivenOutcomes:
    """Returns the answers of an earlier capture, in order.

    Raises
    ------
    OutcomeMismatchError
        When more, fewer or other kinds of answers are asked for.
    """

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = tuple(outcomes)
        self._num_taken = 0

    def of_call(self, func: Any, where: str) -> Outcome:
        """Return the answer to a call."""
        outcome = self._next(str(func), where)
        returns = [str(r.type) for r in schema_of(func).returns]
        num_made = sum(r == "Tensor" for r in returns)
        fits = len(outcome.made) == num_made if outcome.made is not None else num_made == 0
        if not fits or outcome.values is not None:
            raise OutcomeMismatchError(
                f"{func} ({where}) does not return what question {self._num_taken} did when "
                "the plan was made"
            )
        return outcome

    def of_reading(self, tensor: torch.Tensor, where: str) -> Outcome:
        """Return the answer to reading a tensor as a whole."""
        outcome = self._next("reading a tensor", where)
        if outcome.values is None or len(outcome.values) != tensor.numel():
            raise OutcomeMismatchError(
                f"{tensor.numel()} values are read ({where}), which question {self._num_taken} "
                "was not about when the plan was made"
            )
        return outcome

    def finish(self) -> None:
        """Declare that nothing more will be asked."""
        if self._num_taken != len(self._outcomes):
            raise OutcomeMismatchError(
                f"forward asks for values of tensors {self._num_taken} times, "
                f"{len(self._outcomes)} times when the plan was made"
            )

    def _next(self, what: str, where: str) -> Outcome:
        if self._num_taken == len(self._outcomes):
            raise OutcomeMismatchError(
                f"{what} ({where}) asks for a value, which was not asked for when the plan was "
                f"made ({len(self._outcomes)} were)"
            )
        self._num_taken += 1
        return self._outcomes[self._num_taken - 1]


def made_like(outcome: Outcome, func: Any, args: tuple) -> Any:
    """Tensors of the kinds that an outcome names (fake ones under a fake mode).

    They lie on the device of the arguments, which need not be the sample's.
    """
    assert outcome.made is not None
    device = next(t.device for t in tree_iter(args) if isinstance(t, torch.Tensor))
    tensors = tuple(replace(spec, device=str(device)).empty() for spec in outcome.made)
    return tensors if len(schema_of(func).returns) > 1 else tensors[0]


def read_like(outcome: Outcome, tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor on the CPU with an outcome's values in the shape of ``tensor``."""
    with disable_current_modes():
        return torch.tensor(outcome.values, dtype=tensor.dtype, device="cpu").reshape(tensor.shape)


class ReadsWhole(TorchDispatchMode):
    """A mode that can return all values of a fake tensor at once."""

    def read_whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values on the CPU; ``None`` if this mode leaves the question to PyTorch."""
        raise NotImplementedError

    def asked_number(self, tensor: torch.Tensor) -> AskedNumber | None:
        """What ``.item()`` returns; ``None`` if that is the number itself."""
        return None


def reader_of(tensor: torch.Tensor) -> ReadsWhole | None:
    """Return the innermost active mode that answers for fake tensors."""
    if not isinstance(tensor, FakeTensor):
        return None
    for mode in reversed(current_dispatch_modes()):
        if isinstance(mode, ReadsWhole):
            return mode
    return None


@dataclass(slots=True)
class Handed:
    """Counts the numbers that were returned but whose values nobody has asked for yet."""

    num_numbers: int = 0


@contextmanager
def read_as_a_whole(handed: Handed | None = None) -> Iterator[None]:
    """While active, fake tensors can be read as NumPy arrays and as lists.

    This needs a mode that answers for them. Read element by element, a list of a
    hundred numbers would be a hundred questions.

    Parameters
    ----------
    handed
        Counts each :class:`~graph_capture.values.asked_numbers.AskedNumber` that ``.item()``
        returns; ``None`` makes ``.item()`` return plain numbers at once.
    """
    cls: Any = FakeTensor
    names = ("tolist", "numpy", "item", "__array__", "__bool__", "__format__")
    before = {name: cls.__dict__.get(name) for name in names}

    def whole(tensor: torch.Tensor) -> torch.Tensor | None:
        reader = reader_of(tensor)
        return None if reader is None or tensor.dim() == 0 else reader.read_whole(tensor)

    def tolist(tensor: torch.Tensor) -> Any:
        value = whole(tensor)
        if value is None:
            return before["tolist"](tensor)
        with disable_current_modes():
            return value.tolist()

    def as_array(tensor: torch.Tensor, *, force: bool = False) -> Any:
        reader = reader_of(tensor)
        value = None if reader is None else reader.read_whole(tensor)
        if value is None:
            return torch.Tensor.numpy(tensor, force=force)
        with disable_current_modes():
            return value.numpy()

    def array(tensor: torch.Tensor, dtype: Any = None) -> Any:
        values = as_array(tensor)
        return values if dtype is None else values.astype(dtype, copy=False)

    def truth(tensor: torch.Tensor) -> bool:
        """Ask only whether the number is zero, not which number it is."""
        if tensor.dtype == torch.bool or tensor.numel() != 1 or reader_of(tensor) is None:
            return torch.Tensor.__bool__(tensor)
        return torch.Tensor.__bool__(tensor != 0)

    def item(tensor: torch.Tensor) -> Any:
        reader = None if handed is None else reader_of(tensor)
        number = None if reader is None or tensor.numel() != 1 else reader.asked_number(tensor)
        if handed is None or number is None:
            return torch.Tensor.item(tensor)
        handed.num_numbers += 1
        return number

    def text(tensor: torch.Tensor, spec: str) -> str:
        """Write a number as PyTorch does, which checks for its own class."""
        if tensor.dim() or reader_of(tensor) is None:
            return object.__format__(tensor, spec)
        return format(item(tensor), spec)

    cls.tolist, cls.numpy, cls.__array__, cls.__bool__ = tolist, as_array, array, truth
    cls.item, cls.__format__ = item, text
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(cls, name)
            else:
                setattr(cls, name, method)


def same_number(a: Number, b: Number) -> bool:
    """Equality for which NaN is equal to itself."""
    return a == b or (a != a and b != b)


def _number_to_json(x: Number) -> Any:
    if isinstance(x, complex):
        return {"complex": [_number_to_json(x.real), _number_to_json(x.imag)]}
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x


def _number_from_json(x: Any) -> Number:
    if isinstance(x, Mapping):
        real, imaginary = (_number_from_json(part) for part in x["complex"])
        return complex(real, imaginary)
    return float(x) if isinstance(x, str) else x


__all__ = [
    "ASKS",
    "GivenOutcomes",
    "Handed",
    "Number",
    "Outcome",
    "OutcomeMismatchError",
    "ReadsWhole",
    "made_like",
    "read_as_a_whole",
    "read_like",
    "reader_of",
    "same_number",
]
