"""Make a capture use the gradient formulas that eager uses without a dispatch mode.

PyTorch's gradient formulas ask ``isTensorSubclassLike``, which is true of every
tensor while a dispatch mode records. If the answer affects the bits, the node's own
result is replaced by that of one operator that does what eager does
(:mod:`~.formula_operators`). Nobody then reads what the node has recorded, and it is
dropped.

The formulas that ask were found by running the gradients of every operator in
PyTorch's own database (2.13, on the CPU, real and complex, three layouts) with and
without a mode; tests/graph_capture/recording/test_eager_formulas.py repeats this. Handled here
are:

- other bits: products (``prod``, ``cumprod``) and the value of ``masked_fill``;
- another layout, and so other bits in later sums: the even split of a full ``max``,
  ``min`` or ``median``, ``masked_select``, and products of Householder reflections.

Not handled are ``linalg.lstsq``, which is refused because its sizes depend on values,
and ``linalg.pinv`` of complex matrices, whose bits differ while the mode runs but not
in a planned step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..calls.formula_operators import (
    NAMESPACE,
    cumprod_factor_by_factor,
    cumprod_without_zeros,
    prod_without_zeros,
)
from ..private_torch.autograd import current_node, is_wrapped_by_transform, saved_by
from ..private_torch.replacing import ENGINE

_Gradients = Sequence[torch.Tensor | None]
_Formula = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor | None]

_SIGNED = 1 << 63  # saved dimensions come back as unsigned numbers
_HOOKED = "remat takes eager's formula"  # in the metadata of a node


def _dim_of(node: Any) -> int:
    dim = saved_by(node, "dim")
    dim = dim - 2 * _SIGNED if dim >= _SIGNED else dim
    return dim % saved_by(node, "self").dim()


def _prod(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    if saved_by(node, "self").dim() == 0:
        return None
    return _own("prod_backward")(
        grad, saved_by(node, "self").to(grad.dtype), saved_by(node, "result")
    )


def _prod_dim(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = saved_by(node, "self")
    if given.dim() == 0:
        return None
    return _own("prod_dim_backward")(
        grad,
        given.to(grad.dtype),
        saved_by(node, "result"),
        _dim_of(node),
        saved_by(node, "keepdim"),
    )


def _cumprod(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = saved_by(node, "self")
    if given.numel() <= 1 or given.shape[_dim_of(node)] == 1:
        return None
    return _own("cumprod_backward")(
        grad.to(given.dtype), given, saved_by(node, "result"), _dim_of(node)
    )


def _evenly(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = saved_by(node, "self")
    if given.device.type == "cuda":
        return None  # eager takes the same formula as under a mode
    return _own("evenly_distribute_backward")(grad, given, saved_by(node, "result"))


def _masked_fill(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor:
    return _own("masked_fill_value_backward")(grad, saved_by(node, "mask"))


def _laid_out_as(saved: str) -> _Formula:
    """Lay a gradient out like ``saved``.

    Eager writes parts into zeros like the argument; under a mode they are joined or copied.
    """

    def laid_out(node: Any, _grad: torch.Tensor, made: torch.Tensor) -> torch.Tensor | None:
        argument = saved_by(node, saved)
        if argument.shape != made.shape:
            return None  # was summed, since it was broadcast
        like = torch.empty_like(argument)
        return None if like.stride() == made.stride() else like.copy_(made)

    return laid_out


# -- gradients that are differentiated again: eager's calls, one by one -------------


def _has_zeros(given: torch.Tensor) -> bool:
    with torch.no_grad():
        return bool((given == 0).any())


def _prod_again(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = saved_by(node, "self").to(grad.dtype)
    if given.dim() == 0 or _has_zeros(given):
        return None  # with a zero in it, eager takes the same formula as under a mode
    return prod_without_zeros(grad, given, saved_by(node, "result"))


def _prod_dim_again(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given, result = saved_by(node, "self").to(grad.dtype), saved_by(node, "result")
    if given.dim() == 0 or _has_zeros(given):
        return None
    if not saved_by(node, "keepdim"):
        grad, result = grad.unsqueeze(_dim_of(node)), result.unsqueeze(_dim_of(node))
    return prod_without_zeros(grad, given, result)


def _cumprod_again(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given = saved_by(node, "self")
    if given.numel() <= 1 or given.shape[_dim_of(node)] == 1:
        return None
    if _has_zeros(given):
        # Since torch 2.14 eager takes another formula than under a mode.
        return cumprod_factor_by_factor(grad.to(given.dtype), given, _dim_of(node))
    return cumprod_without_zeros(
        grad.to(given.dtype), given, saved_by(node, "result"), _dim_of(node)
    )


def _evenly_again(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor | None:
    given, value = saved_by(node, "self"), saved_by(node, "result")
    if given.device.type == "cuda":
        return None
    mask = (given == value) | (given.isnan() & value.isnan())
    return grad.new_zeros(given.shape).masked_fill_(mask, grad / mask.sum())


class _MaskedSum(torch.autograd.Function):
    """Sum of the elements under a mask, in the order in which eager adds them up."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = grad.shape
        return _own("masked_fill_value_backward")(grad, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        zero = gradients[0].new_zeros(())
        return torch.where(mask, gradients[0], zero).expand(ctx.shape), None


def _masked_fill_again(node: Any, grad: torch.Tensor, _made: torch.Tensor) -> torch.Tensor:
    made = _MaskedSum.apply(grad, saved_by(node, "mask"))
    assert isinstance(made, torch.Tensor)
    return made


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
    "MaskedSelectBackward0": {0: _laid_out_as("self")},
    "OrmqrBackward0": {0: _laid_out_as("self"), 1: _laid_out_as("input2")},
    "LinalgHouseholderProductBackward0": {
        0: _laid_out_as("input"),
        1: _laid_out_as("tau"),
    },
}

# The same, for gradients that are differentiated again.
_FORMULAS_AGAIN: dict[str, dict[int, _Formula]] = {
    **_FORMULAS,
    "ProdBackward0": {0: _prod_again},
    "ProdBackward1": {0: _prod_dim_again},
    "CumprodBackward0": {0: _cumprod_again},
    "MaxBackward1": {0: _evenly_again},
    "MinBackward1": {0: _evenly_again},
    "MedianBackward0": {0: _evenly_again},
    "NanmedianBackward0": {0: _evenly_again},
    "MaskedFillBackward1": {1: _masked_fill_again},
}


_PRODUCTS = ("ProdBackward0", "ProdBackward1")


def as_eager(node: Any, made: _Gradients, given: _Gradients) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients that eager would have computed from ``given`` instead of ``made``."""
    found = list(made)
    if given[0] is not None:
        for i, formula in _formulas_of(node, given[0]).items():
            gradient = found[i]
            if gradient is None:
                continue
            replaced = formula(node, given[0], gradient)
            if replaced is not None:
                found[i] = replaced.to(gradient.dtype)  # as the engine casts a node's results
    return tuple(found)


def _formulas_of(node: Any, grad: torch.Tensor) -> dict[int, _Formula]:
    name = node.name()
    if name not in _FORMULAS:
        return {}
    if _is_wrapped(grad):  # only products ask about their argument alone, after its cast
        asks = name in _PRODUCTS and not _is_wrapped(saved_by(node, "self").to(grad.dtype))
        return _FORMULAS_AGAIN[name] if asks else {}
    return (_FORMULAS_AGAIN if torch.is_grad_enabled() else _FORMULAS)[name]


def _is_wrapped(gradient: torch.Tensor) -> bool:
    """Whether it is a tensor of ``torch.func``: eager does not ask for their values either."""
    return bool(is_wrapped_by_transform(gradient))


@contextmanager
def eager_formulas_taken() -> Iterator[None]:
    """While active, every derivative is taken by eager's formulas, in forward too."""
    before = ENGINE.value  # grad() and backward() look it up there
    mine = threading.get_ident()  # others train models of their own

    def run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == mine:
            take_eager_formulas(outputs)
        return before(outputs, *args, **kwargs)

    with ENGINE.holding(run):
        yield


def take_eager_formulas(outputs: Iterable[Any]) -> None:
    """Hook the nodes behind ``outputs`` whose formula differs without a mode.

    Parameters
    ----------
    outputs
        Tensors, or edges of the graph.
    """
    roots: Iterable[Any]
    roots = (t.grad_fn if isinstance(t, torch.Tensor) else t.node for t in outputs)
    todo = [node for node in roots if node is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.name() in _FORMULAS and _HOOKED not in node.metadata:
            node.metadata[_HOOKED] = True
            _hook(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _hook(node: Any) -> None:
    # A hook that held its own node would keep it alive for ever: it asks for the node when it runs.
    def replace(made: _Gradients, given: _Gradients) -> tuple[torch.Tensor | None, ...]:
        return as_eager(current_node(), made, given)

    node.register_hook(replace)


def _own(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default
