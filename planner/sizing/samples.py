"""A sample at another batch size or sequence length: specifications, no memory.

A capture depends only on shapes, so a resized sample is the call's arguments with a
:class:`~graph_capture.calls.call_spec.TensorSpec` in place of each tensor.

Which dimensions are resized
----------------------------
The first tensor of the sample that has the dimension gives the current sizes of batch
(B) and sequence (L). Then, in every tensor,

- dimension ``batch_dim`` follows the batch if its size is B;
- dimension ``sequence_dim`` follows the sequence if its size is L;
- in integer and boolean tensors, every other dimension of size L does so, too:
  ``(L,)`` and ``(1, L)`` positions, ``(B, 1, 1, L)`` and ``(B, 1, L, L)`` masks;
- in floating-point tensors, the last two do so if both have size L and there are
  only ones between them and the batch: additive masks of shape ``(L, L)``,
  ``(1, 1, L, L)`` and ``(B, 1, L, L)``. ``(B, L, L)`` is read as L features at each
  of L positions.

Other sizes stay: the shorter labels of an encoder-decoder, images beside text, one set
of positions for all rows. If that is wrong, pass your own
``make_sample(batch, sequence)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from graph_capture.calls.call_spec import TensorSpec, changed, strides_like

MakeSample = Callable[[int, int | None], Any]
"""The caller's function from a batch size and a sequence length (or ``None``) to a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizableSample:
    """The arguments of a call, and which of their dimensions are batch and sequence.

    Parameters
    ----------
    arguments
        By name, with a ``TensorSpec`` for each tensor, see ``call_spec.describe``.
    batch_dim, sequence_dim
        Dimensions, counted from the front.

    Raises
    ------
    ValueError
        When a dimension is negative, or no tensor has the batch dimension.
    """

    arguments: Mapping[str, Any]
    batch_dim: int = 0
    sequence_dim: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_dim", "sequence_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is counted from the front, from 0, got {value!r}")
        if self.batch_dim == self.sequence_dim:
            raise ValueError(f"batch_dim and sequence_dim are both {self.batch_dim}")

    @property
    def batch(self) -> int | None:
        """Batch size of the sample itself; ``None`` if no tensor has the dimension."""
        return self._size(self.batch_dim)

    @property
    def sequence(self) -> int | None:
        """Sequence length of the sample itself; ``None`` if no tensor has the dimension."""
        return self._size(self.sequence_dim)

    def resized(self, batch: int | None = None, sequence: int | None = None) -> dict[str, Any]:
        """The arguments at another batch size or sequence length; ``None`` keeps it.

        Raises
        ------
        ValueError
            When no tensor has the dimension that is to be resized.
        """
        if batch is not None and self.batch is None:
            raise ValueError(self._lacking("batch", self.batch_dim))
        if sequence is not None and self.sequence is None:
            raise ValueError(self._lacking("sequence", self.sequence_dim))
        return changed(dict(self.arguments), lambda spec: self.resize(spec, batch, sequence))

    def resize(
        self, spec: TensorSpec, batch: int | None = None, sequence: int | None = None
    ) -> TensorSpec:
        """One tensor at another batch size or sequence length."""
        shape = list(spec.shape)
        of_batch = self.batch_dim < len(shape) and shape[self.batch_dim] == self.batch
        places = self._sequence_places(spec, of_batch) if sequence is not None else set()
        if of_batch and batch is not None:
            shape[self.batch_dim] = batch
        for i in places:
            assert sequence is not None
            shape[i] = sequence
        if tuple(shape) == spec.shape:
            return spec
        return replace(spec, shape=tuple(shape), stride=strides_like(spec, shape))

    def _sequence_places(self, spec: TensorSpec, of_batch: bool) -> set[int]:
        """The dimensions that follow the sequence."""
        length, shape = self.sequence, spec.shape
        as_long = {i for i, size in enumerate(shape) if size == length}
        as_long -= {self.batch_dim} if of_batch else set()
        places = as_long & {self.sequence_dim}
        if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return as_long
        last_two = {len(shape) - 2, len(shape) - 1}
        before = [
            size for i, size in enumerate(shape[:-2]) if not (of_batch and i == self.batch_dim)
        ]
        features = of_batch and len(shape) == 3
        if last_two <= as_long and set(before) <= {1} and not features:
            places |= last_two
        return places

    def _size(self, dim: int) -> int | None:
        return next((s.shape[dim] for s in _specs_in(self.arguments) if len(s.shape) > dim), None)

    def _lacking(self, what: str, dim: int) -> str:
        shapes = ", ".join(str(list(s.shape)) for s in _specs_in(self.arguments)) or "no tensors"
        return (
            f"no tensor of the sample has a dimension {dim} for the {what} (shapes: {shapes}); "
            f"give {what}_dim, or make_sample(batch, sequence)"
        )


def _specs_in(value: Any) -> Iterator[TensorSpec]:
    """Tensors of a call, in the order of its arguments."""
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _specs_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _specs_in(item)
