"""``tensor_split`` by a tensor: PyTorch reads its indices from memory, which stand-ins lack.

They are read like any list of numbers: on the sample, and checked in each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..private_torch.fake_tensors import FakeTensor


@contextmanager
def split_places_read() -> Iterator[None]:
    """While active, split places given as a stand-in are read before PyTorch sees them."""
    base: Any = torch.Tensor
    own_function, own_method = torch.tensor_split, base.tensor_split

    def places(tree: Any) -> Any:
        return tree.tolist() if isinstance(tree, FakeTensor) else tree

    def reading(own: Any) -> Any:
        def split(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 1:  # the first argument is the tensor to split
                args = (args[0], *(places(x) for x in args[1:]))
            return own(*args, **_read(kwargs, places))

        return split

    functions: Any = torch
    functions.tensor_split, base.tensor_split = reading(own_function), reading(own_method)
    try:
        yield
    finally:
        functions.tensor_split = own_function
        del base.tensor_split


def _read(kwargs: dict[str, Any], places: Any) -> dict[str, Any]:
    """Keyword arguments with a list of places instead of a tensor of them."""
    read = dict(kwargs)
    given = read.get("tensor_indices_or_sections")
    if isinstance(given, FakeTensor):
        del read["tensor_indices_or_sections"]
        read["indices" if given.dim() else "sections"] = places(given)
    return read


__all__ = ["split_places_read"]
