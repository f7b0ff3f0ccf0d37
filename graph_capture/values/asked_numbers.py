"""The result of ``.item()`` on a stand-in: a number whose value is read only when it matters.

Most numbers that forward reads out of tensors are compared (``x.max().item() >= n``)
or returned (a loss for the log). A comparison needs only a yes or no, which holds in
many steps. A returned number needs no value at all: the planned step reads it out of
its own tensor. Only code that computes with the number needs its value, and its plan
holds for that value alone.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import CaptureError
from ..lines import OWN_ROOTS

_EXACT = 2**53  # integers below it are exact as float64
_NUMBERS = (bool, int, float, np.bool_, np.integer, np.floating)


class AskedNumber:
    """Behaves as the number that a tensor of one element holds.

    Parameters
    ----------
    tensor
        A stand-in.
    is_fresh
        Whether the tensor still holds the same number.
    unknown
        Whether no plan may depend on the number's value.
    at_once
        Whether to ask for the value even where it is only compared.
    """

    __slots__ = ("_at_once", "_is_fresh", "_unknown", "copy", "tensor")

    def __init__(
        self,
        tensor: torch.Tensor,
        *,
        is_fresh: Callable[[], bool] = lambda: True,
        unknown: bool = False,
        at_once: bool = False,
    ) -> None:
        self.tensor = tensor
        self.copy: torch.Tensor | None = None
        self._is_fresh, self._unknown, self._at_once = is_fresh, unknown, at_once

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Look like a number to the model's code."""
        if sys._getframe(1).f_code.co_filename.startswith(OWN_ROOTS):
            return AskedNumber
        return float if self.tensor.is_floating_point() else int

    def settle(self) -> None:
        """Keep the number, whatever happens to the tensor later."""
        if self.copy is None:
            with torch.no_grad():
                self.copy = self._held().detach().clone()

    def value(self) -> Any:
        """The number itself."""
        return torch.Tensor.item(self._held())

    def _held(self) -> torch.Tensor:
        if self.copy is not None:
            return self.copy
        if not self._is_fresh():
            raise CaptureError("a tensor was written to between .item() and the number's use")
        return self.tensor

    def _as(self, dtype: torch.dtype) -> torch.Tensor:
        with torch.no_grad():
            return self._held().detach().reshape(()).to(dtype)

    def _compare(self, other: Any, compare: Callable[[Any, Any], Any]) -> Any:
        asked = type(other) is AskedNumber
        if self._at_once or not (asked or isinstance(other, _NUMBERS)):
            return compare(self.value(), _plain(other))
        if not asked and isinstance(other, np.generic):
            other = other.item()
        whole = other.tensor if asked else other
        both_integers = not (self.tensor.is_floating_point() or _is_float(whole))
        if not asked and abs(other) >= _EXACT and not math.isinf(other):
            return compare(self.value(), other)
        # Compare as Python does: neither number is rounded to float32.
        dtype = torch.int64 if both_integers else torch.float64
        with torch.no_grad():
            return bool(compare(self._as(dtype), other._as(dtype) if asked else other))

    def __eq__(self, other: object) -> Any:
        return self._compare(other, operator.eq)

    def __ne__(self, other: object) -> Any:
        return self._compare(other, operator.ne)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, operator.lt)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, operator.le)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, operator.gt)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, operator.ge)

    def __bool__(self) -> bool:
        return bool(self._compare(0, operator.ne))

    def __hash__(self) -> int:
        return hash(self.value())

    def __deepcopy__(self, memo: Any) -> AskedNumber:
        return self

    def __reduce__(self) -> Any:
        raise CaptureError("a number that forward reads out of a tensor is pickled")

    def __getattr__(self, name: str) -> Any:
        """Methods and attributes of numbers."""
        if name.startswith("__") or not hasattr(float if _is_float(self.tensor) else int, name):
            raise AttributeError(name)
        return getattr(self.value(), name)

    # -- text ----------------------------------------------------------------------

    def __format__(self, spec: str) -> str:
        return format(self._in_text(), spec)

    def __str__(self) -> str:
        return str(self._in_text())

    def __repr__(self) -> str:
        return repr(self._in_text())

    def _in_text(self) -> Any:
        """The value, or nan with a warning if each step has another number."""
        if not (self._unknown and self.tensor.is_floating_point()):
            return self.value()
        warnings.warn(
            "forward writes a number of the step into a text, for a log, say: while it is "
            "planned it reads nan, and planned steps write nothing. Return the number (x.item() "
            "or the tensor) and log it in the training loop",
            UserWarning,
            stacklevel=3,
        )
        return math.nan


def _is_float(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, torch.Tensor) else isinstance(x, float)


def _plain(x: Any) -> Any:
    return x.value() if type(x) is AskedNumber else x


def _forward(function: Callable[..., Any]) -> Any:
    def method(self: AskedNumber, *others: Any) -> Any:
        return function(self.value(), *map(_plain, others))

    return method


def _reflected(function: Callable[..., Any]) -> Any:
    def method(self: AskedNumber, other: Any) -> Any:
        return function(_plain(other), self.value())

    return method


_TWO_SIDED = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "divmod": divmod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
_ONE_SIDED: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": operator.abs,
    "invert": operator.invert,
    "index": operator.index,
    "int": int,
    "float": float,
    "complex": complex,
    "round": round,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
}
for _name, _function in _TWO_SIDED.items():
    setattr(AskedNumber, f"__{_name}__", _forward(_function))
    setattr(AskedNumber, f"__r{_name}__", _reflected(_function))
for _name, _one_sided in _ONE_SIDED.items():
    setattr(AskedNumber, f"__{_name}__", _forward(_one_sided))


__all__ = ["AskedNumber"]
