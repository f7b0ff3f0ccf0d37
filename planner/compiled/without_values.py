"""Run library kernels for their memory, also those that refuse the values they are given.

Code that is run for its memory has zeros for values. Some kernels look at them first: a matrix of
zeros has no inverse, and nothing is drawn from probabilities whose sum is zero. What they take does
not depend on values, so they are given others: identity matrices, or ones. A call that returns
nothing is there for its check alone, which is passed over. A few kernels do take more on other
values; they are given those on which they take the most.
"""

from __future__ import annotations

from typing import Any

import torch

from graph_capture.private_torch.dispatch import TorchDispatchMode
from graph_capture.private_torch.operators import OpOverload, schema_of
from graph_capture.private_torch.trees import tree_leaves

from ..errors import PlanError


class WithoutValues(TorchDispatchMode):
    """While active, kernels run on whatever values they accept."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and schema_of(func).name in _TAKES_MORE_ON_LARGE:
            _distinct(args[0]).fill_(LARGE)
        made, refusal = _tried(func, args, kwargs)
        if refusal is None or _only_checks(func):
            return made
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for fill in (_fill_with_identities, _fill_with_ones):
            for tensor in read:
                if tensor.is_floating_point() or tensor.is_complex():
                    fill(_distinct(tensor))
            made, refusal = _tried(func, args, kwargs)
            if refusal is None:
                return made
        raise PlanError(REFUSED.format(func=func, refusal=refusal))


_TAKES_MORE_ON_LARGE = {"aten::linalg_matrix_exp"}  # scaling and squaring, and most terms
LARGE = 100.0

REFUSED = (
    "what the compiled step takes is not known, and nothing is planned: to know it, its library "
    "kernels are run on zeros, on identity matrices, or on ones, and {func} accepts none of these "
    "({refusal}). The option lower='aot_eager' needs no such run"
)


def _tried(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, str | None]:
    """What a call returns, or why it fails; the error itself would keep its arguments."""
    try:
        return func(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001, operators of the user's own raise any
        return None, f"{type(error).__name__}: {error}"


def _only_checks(func: Any) -> bool:
    schema = schema_of(func)
    return not schema.returns and not schema.is_mutable


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """A view of each element in memory once."""
    sizes = [n if step else min(n, 1) for n, step in zip(tensor.shape, tensor.stride())]
    return tensor.as_strided(sizes, tensor.stride())


def _fill_with_identities(tensor: torch.Tensor) -> None:
    if tensor.dim() > 1:
        tensor.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)


def _fill_with_ones(tensor: torch.Tensor) -> None:
    tensor.fill_(1)


__all__ = ["REFUSED", "WithoutValues"]
