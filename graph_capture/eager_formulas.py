"""Let a capture take the gradient formulas that eager takes without a dispatch mode.

PyTorch asks ``isTensorSubclassLike`` in its gradient formulas, which is true of
every tensor while a dispatch mode records. Where the answer decides which bits
come out, the node's own result is replaced by that of one operator that does
what eager does (:mod:`~.formula_operators`); what the node has recorded is read
by nobody then and is dropped.

Which formulas ask was found by running the gradients of every operator of PyTorch's
own database (2.13, on the CPU, real and complex, three layouts) with and without a
mode; tests/graph_capture/test_eager_formulas.py does so again. Other bits come out
of products (``prod``, ``cumprod``) and of the value of ``masked_fill``; another
layout, and so other bits of what is summed up from there, of the even split of a
full ``max``, ``min`` or ``median``, of ``masked_select`` and of products of
Householder reflections: they are here. Not here are ``linalg.lstsq``, which is refused
since its sizes depend on values, and ``linalg.pinv`` of complex matrices, whose bits
differ while the mode runs and not in a planned step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .formula_operators import NAMESPACE

_Gradients = Sequence[torch.Tensor | None]
_Formula = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor | None]

_SIGNED = 1 << 63  # saved dimensions come back as unsigned numbers


def _dim_of(node: Any) -> int:
    dim = node._saved_dim
    dim = dim - 2 * _SIGNED if dim >= _SIGNED else dim
    return dim % node._saved_self.dim()


def _prod(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    if node._saved_self.dim() == 0:
        return None
    return _own("prod_backward")(grad, node._saved_self, node._saved_result)


def _prod_dim(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = node._saved_self
    if given.dim() == 0:
        return None
    return _own("prod_dim_backward")(
        grad, given, node._saved_result, _dim_of(node), node._saved_keepdim
    )


def _cumprod(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = node._saved_self
    if given.numel() <= 1 or given.shape[_dim_of(node)] == 1:
        return None
    return _own("cumprod_backward")(grad, given, node._saved_result, _dim_of(node))


def _evenly(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = node._saved_self
    if given.device.type == "cuda":
        return None  # there eager's formula is the one that is taken under a mode
    return _own("evenly_distribute_backward")(grad, given, node._saved_result)


def _masked_fill(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor:
    return _own("masked_fill_value_backward")(grad, node._saved_mask)


def _laid_out_as(saved: str) -> _Formula:
    """Eager writes parts into zeros like the argument; under a mode they are joined or copied."""

    def laid_out(node: Any, _grad: torch.Tensor, made: torch.Tensor) -> torch.Tensor | None:
        argument = getattr(node, saved)
        if argument.shape != made.shape:
            return None  # was summed, since it was broadcast
        like = torch.empty_like(argument)
        return None if like.stride() == made.stride() else like.copy_(made)

    return laid_out


# Name of the node -> which of its gradients are replaced, and by what.
_FORMULAS: dict[str, dict[int, _Formula]] = {
    "ProdBackward0": {0: _prod},
    "ProdBackward1": {0: _prod_dim},
    "CumprodBackward0": {0: _cumprod},
    "MaxBackward1": {0: _evenly},
    "MinBackward1": {0: _evenly},
    "MedianBackward0": {0: _evenly},
    "NanmedianBackward0": {0: _evenly},
    "MaskedFillBackward1": {1: _masked_fill},
    "MaskedSelectBackward0": {0: _laid_out_as("_saved_self")},
    "OrmqrBackward0": {0: _laid_out_as("_saved_self"), 1: _laid_out_as("_saved_input2")},
    "LinalgHouseholderProductBackward0": {
        0: _laid_out_as("_saved_input"),
        1: _laid_out_as("_saved_tau"),
    },
}


def as_eager(node: Any, made: _Gradients, given: _Gradients) -> tuple[torch.Tensor | None, ...]:
    """The gradients that eager would have made of ``given`` where the node made ``made``."""
    found = list(made)
    if given[0] is not None:
        for i, formula in _FORMULAS.get(node.name(), {}).items():
            gradient = found[i]
            replaced = None if gradient is None else formula(node, given[0], gradient)
            found[i] = gradient if replaced is None else replaced
    return tuple(found)


def take_eager_formulas(tensors: Iterable[torch.Tensor]) -> None:
    """Hook the nodes that ``tensors`` depend on and whose formula is another without a mode."""
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.name() in _FORMULAS:
            _hook(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _hook(node: Any) -> None:
    # A hook that knows its own node would keep it alive for ever: it is asked for when it runs.
    def replace(made: _Gradients, given: _Gradients) -> tuple[torch.Tensor | None, ...]:
        return as_eager(torch._C._current_autograd_node(), made, given)

    node.register_hook(replace)


def _own(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default
