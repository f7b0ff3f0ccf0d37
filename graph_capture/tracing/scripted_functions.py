"""Functions of TorchScript, whose backward pass PyTorch writes anew after their first calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LEAST_JOINED = 2  # calls that TorchScript differentiates as one


@contextmanager
def scripted_functions_said() -> Iterator[None]:
    """While active, warn of a scripted function that takes part in the backward pass.

    A function's first call is differentiated by autograd. From then on, TorchScript
    differentiates it by formulas of its own, which round otherwise. A step is captured with
    the one or the other.
    """
    kind: Any = torch.jit.ScriptFunction
    before = kind.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before(self, *args, **kwargs)
        if isinstance(result, torch.Tensor) and result.requires_grad and _is_joined(self):
            warnings.warn(
                f"forward calls {self.name}, a function of TorchScript, whose gradients PyTorch "
                "computes in two ways, before and after its first calls: a plan has one of them, "
                "so that last bits may differ from eager's. Take the Python function that was "
                "scripted",
                stacklevel=2,
            )
        return result

    kind.__call__ = called
    try:
        yield
    finally:
        kind.__call__ = before


def _is_joined(function: Any) -> bool:
    calls = [node for node in function.graph.nodes() if node.kind().startswith("aten::")]
    return sum("Tensor" in str(node.output().type()) for node in calls) >= _LEAST_JOINED
