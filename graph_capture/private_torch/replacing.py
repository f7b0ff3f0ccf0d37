"""Functions and flags of PyTorch that are replaced while a step is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint


@dataclass(frozen=True, slots=True)
class Place:
    """A name in a module of PyTorch, which PyTorch looks up each time.

    Parameters
    ----------
    holder
        The module.
    name
        In it.
    """

    holder: Any
    name: str

    @property
    def value(self) -> Any:
        """What is there now."""
        return getattr(self.holder, self.name)

    @contextmanager
    def holding(self, value: Any) -> Iterator[None]:
        """While active, ``value`` is there; then what was there before, or nothing."""
        table = vars(self.holder)
        was_there, before = self.name in table, table.get(self.name)
        setattr(self.holder, self.name, value)
        try:
            yield
        finally:
            if was_there:
                setattr(self.holder, self.name, before)
            else:
                delattr(self.holder, self.name)


# 2.11+; what grad() and backward() call
ENGINE = Place(torch.autograd, "_engine_run_backward")
# 2.11+; what torch.compiler.is_compiling() says
IS_COMPILING = Place(torch.compiler, "_is_compiling_flag")
# 2.11+; layout of a convolution's result, as its fake kernel asks for it
CONVOLUTION_LAYOUT = Place(torch._C, "_conv_determine_backend_memory_format")
# 2.11+; pad_packed_sequence in C++, found there by torch.nn.utils.rnn
PAD_PACKED_SEQUENCE = Place(torch._VF, "_pad_packed_sequence")
# The older name is still there in 2.14 and calls the newer one.
_GENERATORS = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)
# 2.14+ under the first name, 2.11+ under the second; what checkpoint(use_reentrant=False) runs
CHECKPOINT_GENERATOR = Place(
    torch.utils.checkpoint,
    next((name for name in _GENERATORS if hasattr(torch.utils.checkpoint, name)), _GENERATORS[0]),
)

__all__ = [
    "CHECKPOINT_GENERATOR",
    "CONVOLUTION_LAYOUT",
    "ENGINE",
    "IS_COMPILING",
    "PAD_PACKED_SEQUENCE",
    "Place",
]
