"""Packed sequences of stand-ins, whose lengths PyTorch reads from memory.

``pack_padded_sequence`` and the calls after it walk over batch sizes in C++, and a
stand-in has none. So lengths are read on the sample and checked, like any list of
numbers, and batch sizes are a real tensor. Padding again is written with calls that
can be traced, the same ones that PyTorch makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..private_torch.aten import pack_padded_sequence
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.fake_tensors import FakeTensor
from ..private_torch.replacing import PAD_PACKED_SEQUENCE

PACK = pack_padded_sequence.default


def packed(data: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> Any:
    """Return the result of packing: stand-ins of the elements, and real batch sizes.

    Parameters
    ----------
    data
        A stand-in; only its shape matters.
    lengths
        A real tensor, longest first.
    """
    with disable_current_modes():
        blank = torch.empty(data.shape[:2])
        elements, batch_sizes = PACK(blank, lengths, batch_first)
        num_elements = elements.shape[0]
    return data.new_empty((num_elements, *data.shape[2:])), batch_sizes


@contextmanager
def sequences_padded() -> Iterator[None]:
    """While active, padding a packed sequence of stand-ins is traced."""
    own = PAD_PACKED_SEQUENCE.value

    def pad(
        data: torch.Tensor,
        batch_sizes: torch.Tensor,
        batch_first: bool,
        padding_value: float,
        total_length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(data, FakeTensor) or isinstance(batch_sizes, FakeTensor):
            return own(data, batch_sizes, batch_first, padding_value, total_length)
        with disable_current_modes():
            sizes = batch_sizes.tolist()
        if 0 < total_length < len(sizes):
            raise ValueError(
                f"total_length={total_length} is less than the longest of {len(sizes)} steps"
            )
        length = total_length if total_length > 0 else len(sizes)
        output = torch.full(
            (length, sizes[0], *data.shape[1:]),
            padding_value,
            dtype=data.dtype,
            device=data.device,
        )
        for begin, end, start in _stretches(sizes):
            count = sizes[begin]
            part = data[start : start + count * (end - begin)]
            output[begin:end, :count].copy_(part.view(end - begin, count, *data.shape[1:]))
        lengths = [sum(size > i for size in sizes) for i in range(sizes[0])]
        with disable_current_modes():
            made = torch.tensor(lengths)
        return (output.transpose(0, 1) if batch_first else output), made

    with PAD_PACKED_SEQUENCE.holding(pad):
        yield


def _stretches(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """Begin, end and first element of each run of steps with one batch size."""
    begin = start = 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sizes[i] != sizes[begin]:
            yield begin, i, start
            start += sizes[begin] * (i - begin)
            begin = i


__all__ = ["PACK", "packed", "sequences_padded"]
