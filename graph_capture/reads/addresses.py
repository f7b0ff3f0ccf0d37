"""Memory addresses of tensors, which a step that runs without memory does not have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..errors import NotFittingError
from ..private_torch.fake_tensors import FakeTensor
from .named_reads import is_users

_ASKS = (
    (torch.Tensor, "data_ptr"),
    (torch.Tensor, "__dlpack__"),
    (torch.UntypedStorage, "data_ptr"),
)


@contextmanager
def addresses_refused() -> Iterator[None]:
    """While active, refuse to say where a stand-in lies in memory, instead of 0.

    Code that compares addresses would find all tensors in one place.
    """
    with ExitStack() as undo:
        for cls, name in _ASKS:
            _refuse(cls, name, undo)
        yield


def _refuse(cls: Any, name: str, undo: ExitStack) -> None:
    before = getattr(cls, name)

    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        stands_in = isinstance(self, FakeTensor) or self.device.type == "meta"
        if stands_in and name == "data_ptr" and not is_users(sys._getframe(1).f_code):
            return 0  # PyTorch asks, for example to copy a tensor, and expects this answer
        if stands_in:
            raise NotFittingError(
                f"forward asks for the address of a tensor ({name}), and no tensor has one "
                "while the step is captured. Compare tensors themselves (is), their shapes or "
                "their values, or plan the blocks around this one, each by itself"
            )
        return before(self, *args, **kwargs)

    own = name in vars(cls)
    setattr(cls, name, asked)
    undo.callback(setattr, cls, name, before) if own else undo.callback(delattr, cls, name)
