"""Calls that communicate, as operators of a step.

A functional collective (``_c10d_functional``) returns a result that must be waited for before it is
read. In a graph the wait belongs to the collective: it writes to the result, and keeps what the
collective reads until it has ended, so that the memory of both is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import NotFittingError
from ..private_torch.operators import OpOverload, schema_of

NAMESPACE = "remat_collectives"
FUNCTIONAL = "_c10d_functional"
"""The namespace of collectives that return their results."""
IN_PLACE = "c10d"
"""The namespace of collectives that fill what they are given, those of ``torch.distributed``."""


def is_collective(func: Any) -> bool:
    """Whether a call communicates, so that all processes have to make it, in the same order."""
    return isinstance(func, OpOverload) and func.namespace in (FUNCTIONAL, NAMESPACE)


def is_wait(func: Any) -> bool:
    """Whether a call ends a collective, whose result it returns."""
    return is_collective(func) and schema_of(func).name == f"{FUNCTIONAL}::wait_tensor"


def refuse_in_place(func: OpOverload, phase: str, line: Callable[[], str]) -> None:
    """Refuse a call of ``torch.distributed`` itself, whose results nothing in a graph waits for."""
    if func.namespace == IN_PLACE:
        raise NotFittingError(
            f"{phase} calls {func}, a collective of torch.distributed ({line()}), which fills "
            "tensors while a step goes on, so that no plan can order it. Call those of "
            "torch.distributed._functional_collectives, which return their results and are "
            "planned, or communicate in the training loop, outside of what is planned"
        )


def filled_by(func: Any, args: tuple, out: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each tensor that a collective fills, with what this process gives for it.

    Those of which a process gives a part only (all-to-all, scatter) are none of them.
    """
    if not isinstance(func, OpOverload) or func.namespace not in (IN_PLACE, FUNCTIONAL):
        return []
    name = schema_of(func).name.partition("::")[2]
    if func.namespace == FUNCTIONAL:
        of_whole = ("all_reduce", "all_gather_into_tensor", "broadcast", "wait_tensor")
        return [(out, args[0])] if name in of_whole else []
    if name in ("allreduce_", "broadcast_", "reduce_"):
        return [(tensor, tensor) for tensor in args[0]]
    if name == "allgather_":
        return [(tensor, given) for made, given in zip(args[0], args[1]) for tensor in made]
    return [(args[0], args[1])] if name == "_allgather_base_" else []


def _ended(result: torch.Tensor, read: Sequence[torch.Tensor]) -> None:
    getattr(torch.ops, FUNCTIONAL).wait_tensor(result)


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("ended(Tensor(a!) result, Tensor[] read) -> ()")
_library.impl("ended", _ended, "CompositeExplicitAutograd")
ENDED = getattr(torch.ops, NAMESPACE).ended.default
"""Waits for a collective's result; ``read`` is held until then."""


__all__ = ["ENDED", "IN_PLACE", "filled_by", "is_collective", "is_wait", "refuse_in_place"]
