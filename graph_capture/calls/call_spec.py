"""Specify a model's call: shapes, dtypes, devices, and plain values.

A specification can be compared with a later call (and name the difference),
written as JSON, and turned into stand-in tensors again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from ..errors import NotFittingError
from .spread_out import division_in_words, local_part

_SCALARS = (bool, int, float, str, type(None))
_BY_REPR = (float, complex, np.generic)  # == takes 0.0 for -0.0, and NaN for another number
_BY_VALUE = (bool, int, str, bytes, range, torch.device)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype, device and strides of a tensor argument.

    Those of a ``DTensor`` are of this process's part, and ``division`` says how it is divided.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool
    division: str | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        part = local_part(tensor)
        return cls(
            tuple(part.shape),
            tuple(part.stride()),
            tensor.dtype,
            str(tensor.device),
            tensor.requires_grad,
            division_in_words(tensor),
        )

    def empty(self) -> torch.Tensor:
        """A tensor like this, uninitialized (a fake one under a fake mode)."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return tensor.requires_grad_(self.requires_grad)

    @property
    def extent_bytes(self) -> int:
        """Bytes from the first element to the last, both included."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        grad = ", requires_grad" if self.requires_grad else ""
        step, gaps = 1, False  # makes no tensor, which a capture that is under way would record
        for n, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            gaps |= n > 1 and stride != step
            step *= n
        strides = f" with strides {list(self.stride)}" if gaps and 0 not in self.shape else ""
        whole = f", a part of {self.division}" if self.division else ""
        return f"{dtype}{list(self.shape)}{strides} on {self.device}{grad}{whole}"


def bind_call(forward: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> dict:
    """Bind arguments to the names in the signature of ``forward``.

    Raises
    ------
    TypeError
        When they do not fit the signature.
    """
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


def call_forward(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call ``forward`` with arguments from :func:`bind_call`."""
    bound = inspect.BoundArguments(inspect.signature(forward), dict(arguments))
    return forward(*bound.args, **bound.kwargs)


def split_sample(sample_input: Any) -> tuple[tuple, dict[str, Any]]:
    """Split a tensor, a tuple of positional or a dict of keyword arguments into (args, kwargs)."""
    if isinstance(sample_input, torch.Tensor):
        return (sample_input,), {}
    if isinstance(sample_input, (tuple, list)):
        return tuple(sample_input), {}
    if isinstance(sample_input, Mapping):
        return (), dict(sample_input)
    raise TypeError(
        "sample_input must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments, got {type(sample_input).__name__}"
    )


def describe(value: Any) -> Any:
    """Return the specification of a value: tensors become :class:`TensorSpec`, the rest stays."""
    return _map(value, TensorSpec.of)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in ``value``, in the order in which :func:`describe` meets them."""
    found: list[torch.Tensor] = []
    _map(value, lambda t: found.append(t))
    return found


def objects_of(value: Any) -> list[Any]:
    """Return the objects with attributes in ``value``; a plan passes them on as they are."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        if hasattr(leaf, "__dict__") and not callable(leaf):
            found.append(leaf)
        return leaf

    _map(value, lambda t: t, on_other=note)
    return found


def leaves_of(value: Any) -> list[Any]:
    """Return everything in ``value`` that is neither a tensor nor a container."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    _map(value, lambda t: t, on_other=note)
    return found


def strides_like(spec: TensorSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor like ``spec`` with another shape.

    Dense, in the order of the old ones; what was expanded stays expanded.
    """
    strides = [0] * len(shape)
    step = 1
    outermost = 1 + max(spec.stride, default=0)  # for dimensions of size 1 without a stride
    for i in sorted(range(len(shape)), key=lambda i: (spec.stride[i] or outermost, -i)):
        if spec.stride[i] == 0 and spec.shape[i] > 1:
            continue
        strides[i] = step
        step *= max(1, shape[i])
    return tuple(strides)


def specs_of(spec: Any) -> list[TensorSpec]:
    """Return the tensors in a specification, in the order of :func:`tensors_of`."""
    found: list[TensorSpec] = []
    _map(spec, _same, lambda tensor: found.append(tensor))
    return found


def tensor_names(arguments: Mapping[str, Any]) -> list[str]:
    """Return the argument that each tensor of a call is in, in the order of :func:`tensors_of`."""
    return [name for name in sorted(arguments) for _ in specs_of(describe(arguments[name]))]


def realize(spec: Any) -> Any:
    """Invert :func:`describe`, with new tensors (fake ones under a fake mode)."""
    return _map(spec, lambda tensor: tensor, TensorSpec.empty)


def moved(spec: Any, place: Callable[[torch.device], torch.device]) -> Any:
    """Return a specification with its tensors on the devices that ``place`` gives."""

    def move(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, device=str(place(torch.device(tensor.device))))

    return changed(spec, move)


def changed(spec: Any, change: Callable[[TensorSpec], TensorSpec]) -> Any:
    """Return a specification with each tensor replaced by another one."""
    return _map(spec, lambda tensor: change(TensorSpec.of(tensor)), change)


def _same(value: Any) -> Any:
    return value


def _map(
    value: Any, on_tensor: Callable, spec_leaf: Callable = _same, on_other: Callable = _same
) -> Any:
    if isinstance(value, torch.Tensor):
        return on_tensor(value)
    if isinstance(value, TensorSpec):
        return spec_leaf(value)
    if isinstance(value, Mapping):  # visited by key, whatever the order in which they are written
        mapped = {k: _map(value[k], on_tensor, spec_leaf, on_other) for k in sorted(value, key=str)}
        return {k: mapped[k] for k in value}
    if isinstance(value, PackedSequence):
        raise NotFittingError(
            "an argument is a PackedSequence, whose sizes are values of a tensor: pass the padded "
            "tensor and the lengths as arguments, and pack them in forward"
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, on_tensor, spec_leaf, on_other) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, on_tensor, spec_leaf, on_other) for v in value)
    return on_other(value)


def difference(
    expected: Any, got: Any, path: str = "input", *, in_order: bool = False
) -> str | None:
    """Describe the first difference between two specifications; ``None`` if they are equal.

    Parameters
    ----------
    in_order
        Whether the order of a dict's keys counts, as it does inside of arguments: forward may
        go through them.
    """
    if isinstance(expected, TensorSpec) or isinstance(got, TensorSpec):
        if isinstance(expected, TensorSpec) and isinstance(got, TensorSpec):
            same = replace(expected, stride=got.stride) == got
            if same and (expected.stride == got.stride or 0 in got.shape):
                return None
            if same:
                return f"{path} has strides {got.stride}, planned were {expected.stride}"
        return f"{path} is {got}, planned was {expected}"
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for key in [*expected, *(k for k in got if k not in expected)]:
            if key not in got:
                return f"{path}.{key} is missing, planned was {expected[key]}"
            if key not in expected:
                return f"{path}.{key} is {got[key]}, planned was none"
            found = difference(expected[key], got[key], f"{path}.{key}", in_order=True)
            if found:
                return found
        if in_order and [*expected] != [*got]:
            return (
                f"{path} has its keys in the order {', '.join(map(str, got))}, planned was "
                f"{', '.join(map(str, expected))}"
            )
        return None
    if isinstance(expected, (tuple, list)) and isinstance(got, (tuple, list)):
        if len(expected) != len(got):
            return f"{path} has {len(got)} items, planned were {len(expected)}"
        for i, (e, g) in enumerate(zip(expected, got, strict=True)):
            found = difference(e, g, f"{path}[{i}]", in_order=True)
            if found:
                return found
        return None
    if expected is got or _are_alike(expected, got):
        return None
    return f"{path} is {got!r}, planned was {expected!r}"


def _are_alike(expected: Any, got: Any) -> bool:
    """Whether two values are one to whoever computes with them."""
    if type(expected) is not type(got):
        return False
    if isinstance(expected, slice):
        parts = zip(
            (expected.start, expected.stop, expected.step),
            (got.start, got.stop, got.step),
            strict=True,
        )
        return all(a is b or _are_alike(a, b) for a, b in parts)
    if isinstance(expected, _BY_REPR):
        return repr(expected) == repr(got)
    return isinstance(expected, _BY_VALUE) and bool(expected == got)


def to_json(spec: Any) -> Any:
    """Return a specification as JSON.

    Raises
    ------
    TypeError
        When an argument is neither tensor, plain value nor a container of such.
    """
    if isinstance(spec, TensorSpec):
        return {
            "tensor": {
                "shape": list(spec.shape),
                "stride": list(spec.stride),
                "dtype": str(spec.dtype).removeprefix("torch."),
                "device": spec.device,
                "requires_grad": spec.requires_grad,
                **({} if spec.division is None else {"division": spec.division}),
            }
        }
    if isinstance(spec, Mapping):
        for key in spec:
            if not isinstance(key, str):
                raise TypeError(f"a dict with {key!r:.100} as a key cannot be written as JSON")
        return {"dict": {k: to_json(v) for k, v in spec.items()}}
    if isinstance(spec, tuple):
        return {"tuple": [to_json(v) for v in spec]}
    if isinstance(spec, list):
        return {"list": [to_json(v) for v in spec]}
    if isinstance(spec, _SCALARS):
        return {"value": spec}
    if isinstance(spec, torch.dtype):
        return {"dtype": str(spec).removeprefix("torch.")}
    raise TypeError(f"an argument of type {type(spec).__name__} cannot be written as JSON")


def from_json(data: Any) -> Any:
    """Invert :func:`to_json`.

    Raises
    ------
    ValueError
        When it is not such JSON.
    """
    if not isinstance(data, Mapping) or len(data) != 1:
        raise ValueError(f"not an argument specification: {data!r}")
    kind, body = next(iter(data.items()))
    if kind == "tensor":
        return TensorSpec(
            tuple(body["shape"]),
            tuple(body["stride"]),
            parse_dtype(body["dtype"]),
            body["device"],
            body["requires_grad"],
            body.get("division"),
        )
    if kind == "dict":
        return {k: from_json(v) for k, v in body.items()}
    if kind == "tuple":
        return tuple(from_json(v) for v in body)
    if kind == "list":
        return [from_json(v) for v in body]
    if kind == "dtype":
        return parse_dtype(body)
    if kind == "value" and isinstance(body, _SCALARS):
        return body
    raise ValueError(f"not an argument specification: {data!r}")


def parse_dtype(name: str) -> torch.dtype:
    """``"float32"`` -> ``torch.float32``; nothing else of torch is reachable by name."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"not a dtype: {name!r}")
    return dtype
