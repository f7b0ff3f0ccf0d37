"""The shapes that a loop calls its model with, up to the largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from graph_capture.calls.call_spec import TensorSpec, difference, strides_like
from graph_capture.units import format_bytes

MAX_TENSOR_BYTES = 2**34
"""Of one argument at its largest: it is made once, to see what the step does with it."""

Shapes = Mapping[str, Mapping[int, Any]] | Literal["sample"] | None
"""As users write them: tensor arguments, their dimensions that vary, and the largest size
of each, an integer or a ``torch.export.Dim`` with a ``max``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRange:
    """Which dimensions of a call's tensors vary, and up to what size.

    Parameters
    ----------
    largest
        By the tensor's place in the call (``"input_ids"``, ``"batch.labels"``,
        ``"pair[0]"``) and dimension, the largest size. The least is 1.
    """

    largest: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Shapes, arguments: Mapping[str, Any]) -> ShapeRange:
        """Read a user's ``shapes=`` for a sample call.

        Parameters
        ----------
        shapes
            ``"sample"`` lets every dimension vary, up to the sample's own sizes.
        arguments
            The sample, by argument name.

        Raises
        ------
        ValueError
            When a place, a dimension or a size does not fit the sample.
        """
        if shapes is None:
            return cls()
        tensors = dict(_tensors_in(arguments))
        if shapes == "sample":
            return cls(
                largest={
                    place: {dim: size for dim, size in enumerate(t.shape) if size}
                    for place, t in tensors.items()
                }
            )
        if not isinstance(shapes, Mapping):
            raise ValueError(
                'shapes is "sample" or a mapping such as {"input_ids": {0: 16, 1: 512}}, got '
                f"{shapes!r}"
            )
        largest: dict[str, dict[int, int]] = {}
        for place, dims in shapes.items():
            tensor = tensors.get(place)
            if tensor is None:
                known = ", ".join(map(repr, tensors)) or "none"
                raise ValueError(f"shapes names {place!r}; the sample's tensors are {known}")
            if not isinstance(dims, Mapping):
                raise ValueError(
                    f"shapes[{place!r}] is a mapping from dimensions to their largest sizes, got "
                    f"{dims!r}"
                )
            largest[place] = {dim: _largest(place, tensor, dim, size) for dim, size in dims.items()}
        return cls(largest=largest)

    def enlarged(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the call at its largest shape; longer tensors repeat the sample's values.

        They lie in memory as the sample's do.
        """

        def enlarge(place: str, tensor: torch.Tensor) -> torch.Tensor:
            sizes = self.largest.get(place, {})
            if all(tensor.shape[dim] == size for dim, size in sizes.items()):
                return tensor
            num_bytes = tensor.element_size() * math.prod(
                sizes.get(dim, size) for dim, size in enumerate(tensor.shape)
            )
            if num_bytes > MAX_TENSOR_BYTES:
                raise ValueError(
                    f"shapes[{place!r}] is a tensor of {num_bytes} bytes at its largest; the limit "
                    f"is {format_bytes(MAX_TENSOR_BYTES)} ({MAX_TENSOR_BYTES} bytes): name the "
                    "largest sizes that the loop has"
                )
            longer = tensor.detach()
            for dim, size in sizes.items():
                index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
                longer = longer.index_select(dim, index)
            strides = strides_like(TensorSpec.of(tensor), longer.shape)
            if 0 not in strides and strides != longer.stride():
                empty = torch.empty_strided(
                    longer.shape, strides, dtype=longer.dtype, device=longer.device
                )
                longer = empty.copy_(longer)
            return longer.requires_grad_(tensor.requires_grad)

        return {name: _map(name, value, enlarge) for name, value in arguments.items()}

    def covers(self, planned: Mapping[str, Any], call: Mapping[str, Any]) -> bool:
        """Whether a call differs from the planned one only in sizes within this range.

        Parameters
        ----------
        planned, call
            Both by argument name, with ``TensorSpec`` in the place of tensors.
        """
        if not self.largest:
            return False
        found = dict(_tensors_in(call))

        def resized(place: str, spec: TensorSpec) -> TensorSpec:
            here, shape = found.get(place), list(spec.shape)
            if here is None or len(here.shape) != len(shape):
                return spec
            sizes = self.largest.get(place, {})
            for dim, size in sizes.items():
                if 1 <= here.shape[dim] <= size:
                    shape[dim] = here.shape[dim]
            # What is cut out of a larger tensor lies in the same order, with gaps.
            stride = here.stride if sizes and _lie_alike(spec, here) else spec.stride
            return replace(spec, shape=tuple(shape), stride=stride)

        expected = {name: _map(name, value, resized) for name, value in planned.items()}
        return difference(expected, call) is None

    def check(self, planned: Mapping[str, Any]) -> None:
        """Refuse a range whose largest shape is not the planned call's.

        Raises
        ------
        ValueError
            Names the first place that does not fit.
        """
        specs = dict(_tensors_in(planned))
        for place, dims in self.largest.items():
            shape = specs[place].shape if place in specs else ()
            for dim, size in dims.items():
                if not 0 <= dim < len(shape) or shape[dim] != size or not size:
                    raise ValueError(
                        f"{place!r:.100} has no dimension {dim} of {size} in the planned call"
                    )

    def to_json(self) -> dict[str, dict[str, int]]:
        """The range as plain data."""
        return {p: {str(dim): n for dim, n in dims.items()} for p, dims in self.largest.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, int]]) -> ShapeRange:
        """Invert :meth:`to_json`; the schema has been checked."""
        return cls(largest={p: {int(dim): n for dim, n in d.items()} for p, d in data.items()})

    def __str__(self) -> str:
        parts = []
        for place, dims in self.largest.items():
            sizes = ", ".join(f"dimension {dim} to {size}" for dim, size in dims.items())
            if sizes:
                parts.append(f"{place} ({sizes})")
        return ", ".join(parts)


def _largest(place: str, tensor: torch.Tensor, dim: Any, size: Any) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < tensor.dim():
        raise ValueError(
            f"shapes[{place!r}] has dimension {dim!r}; the sample's has shape "
            f"{list(tensor.shape)}, counted from 0"
        )
    size = getattr(size, "max", size)
    here = tensor.shape[dim]
    if isinstance(size, bool) or not isinstance(size, int) or size < max(here, 1):
        raise ValueError(
            f"shapes[{place!r}][{dim}] is the largest size, at least the sample's {here}, got "
            f"{size!r}"
        )
    if here == 0:
        raise ValueError(f"shapes[{place!r}][{dim}]: the sample has none of them to repeat")
    return size


def _lie_alike(spec: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors' dimensions of more than one element lie in one order, expanded alike."""
    dims = [i for i, (n, m) in enumerate(zip(spec.shape, other.shape, strict=True)) if n > 1 < m]

    def order(one: TensorSpec) -> list[int]:
        moving = [i for i in dims if one.stride[i]]
        return sorted(moving, key=lambda i: (one.stride[i], -i))

    return order(spec) == order(other)


def _tensors_in(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors, or their specifications, with their places in a call."""
    if isinstance(value, (torch.Tensor, TensorSpec)):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors_in(item, f"{place}[{i}]")


def _map(place: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, (torch.Tensor, TensorSpec)):
        return change(place, value)
    if isinstance(value, Mapping):
        return {key: _map(f"{place}.{key}", item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(f"{place}[{i}]", v, change) for i, v in enumerate(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(f"{place}[{i}]", v, change) for i, v in enumerate(value))
    return value


__all__ = ["ShapeRange", "Shapes"]
