"""Calls that communicate, as operators of a step.

A functional collective (``_c10d_functional``) returns a result that must be waited for before it is
read. In a graph the wait belongs to the collective: it writes to the result, and keeps what the
collective reads until it has ended, so that the memory of both is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..private_torch.operators import OpOverload, schema_of

NAMESPACE = "remat_collectives"
FUNCTIONAL = "_c10d_functional"
"""The namespace of collectives that return their results."""


def is_collective(func: Any) -> bool:
    """Whether a call communicates, so that all processes have to make it, in the same order."""
    return isinstance(func, OpOverload) and func.namespace in (FUNCTIONAL, NAMESPACE)


def is_wait(func: Any) -> bool:
    """Whether a call ends a collective, whose result it returns."""
    return is_collective(func) and schema_of(func).name == f"{FUNCTIONAL}::wait_tensor"


def _ended(result: torch.Tensor, read: Sequence[torch.Tensor]) -> None:
    getattr(torch.ops, FUNCTIONAL).wait_tensor(result)


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("ended(Tensor(a!) result, Tensor[] read) -> ()")
_library.impl("ended", _ended, "CompositeExplicitAutograd")
ENDED = getattr(torch.ops, NAMESPACE).ended.default
"""Waits for a collective's result; ``read`` is held until then."""


__all__ = ["ENDED", "is_collective", "is_wait"]
