"""Gradient formulas that eager PyTorch chooses by values, as single-call operators.

While a dispatch mode is active, PyTorch's own formulas avoid reading values
(``isTensorSubclassLike`` is true of every tensor then). They compute the same
gradient in another way, with other last bits. These operators do at run time what
eager does without a mode, and read the values, too. They are pure: the same
arguments give the same bits.

Source: the derivations in PyTorch's ``FunctionsManual.cpp`` and ``ReduceOps.cpp``
(``prod_backward``, ``cumprod_backward``, ``evenly_distribute_backward``,
``masked_fill_backward``), with grad mode off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "remat"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # lives as long as the process

_SCHEMAS = {
    "prod_backward": "(Tensor grad, Tensor input, Tensor result) -> Tensor",
    "prod_dim_backward": (
        "(Tensor grad, Tensor input, Tensor result, int dim, bool keepdim) -> Tensor"
    ),
    "cumprod_backward": "(Tensor grad, Tensor input, Tensor output, int dim) -> Tensor",
    "evenly_distribute_backward": "(Tensor grad, Tensor input, Tensor value) -> Tensor",
    "masked_fill_value_backward": "(Tensor grad, Tensor mask) -> Tensor",
}

PURE = frozenset(f"{NAMESPACE}::{name}" for name in _SCHEMAS)
"""Schema names of the operators; each may be repeated."""


def prod_without_zeros(grad: Tensor, given: Tensor, result: Tensor) -> Tensor:
    """Gradient of a product none of whose factors is zero."""
    return grad * (result / given).conj()


def _prod_with_zeros(grad: Tensor, given: Tensor, dim: int) -> Tensor:
    """Gradient of a product by the products of all other factors, from both ends."""
    if given.numel() == 0:
        return grad.expand_as(given).clone()
    if given.shape[dim] == 1:
        return grad.clone()
    shape = list(given.shape)
    shape[dim] = 1
    ones = torch.ones(shape, dtype=grad.dtype, device=grad.device)
    length = given.shape[dim] - 1
    before = torch.cat([ones, given.narrow(dim, 0, length)], dim).cumprod_(dim)
    after = torch.cat([ones, given.narrow(dim, 1, length).flip(dim)], dim).cumprod_(dim)
    after = after.flip(dim)
    before.mul_(after)
    del after
    return grad * before.conj()


def _laid_out_as(made: Tensor, like: Tensor) -> Tensor:
    """The same values with the strides that the capture saw: those of the usual branch."""
    if made.stride() == like.stride():
        return made
    return torch.empty_strided(
        like.shape, like.stride(), dtype=made.dtype, device=made.device
    ).copy_(made)


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _prod_backward(grad: Tensor, input: Tensor, result: Tensor) -> Tensor:
    num_zeros = input.numel() - torch.count_nonzero(input).item()
    if num_zeros == 0:
        return prod_without_zeros(grad, input, result)
    if num_zeros > 1:
        made = torch.zeros_like(input, memory_format=torch.contiguous_format)
    else:
        made = _prod_with_zeros(grad, input.contiguous().view(-1), 0).view(input.shape)
    return _laid_out_as(made, prod_without_zeros(_on_meta(grad), _on_meta(input), _on_meta(result)))


def _prod_dim_backward(
    grad: Tensor, input: Tensor, result: Tensor, dim: int, keepdim: bool
) -> Tensor:
    if not keepdim:
        grad, result = grad.unsqueeze(dim), result.unsqueeze(dim)
    if not (input == 0).any().item():
        return prod_without_zeros(grad, input, result)
    like = prod_without_zeros(_on_meta(grad), _on_meta(input), _on_meta(result))
    return _laid_out_as(_prod_with_zeros(grad, input, dim), like)


def _prod_dim_meta(grad: Tensor, input: Tensor, result: Tensor, dim: int, keepdim: bool) -> Tensor:
    if not keepdim:
        grad, result = grad.unsqueeze(dim), result.unsqueeze(dim)
    return prod_without_zeros(grad, input, result)


def _reversed_cumsum(t: Tensor, dim: int) -> Tensor:
    return t.flip(dim).cumsum(dim).flip(dim)


def cumprod_without_zeros(grad: Tensor, given: Tensor, output: Tensor, dim: int) -> Tensor:
    """Gradient of a running product none of whose factors is zero."""
    return _reversed_cumsum(output.conj() * grad, dim).div(given.conj())


def cumprod_factor_by_factor(grad: Tensor, given: Tensor, dim: int) -> Tensor:
    """Gradient of a running product by the products that leave one factor out, for any factors.

    Takes as many steps as there are factors, and can be differentiated again.
    """
    factors, length = given.conj(), given.shape[dim]
    made = []
    for k in range(length):
        if k == 0:
            before = torch.ones_like(factors.narrow(dim, 0, 1))
        else:
            before = factors.narrow(dim, 0, k).prod(dim, keepdim=True)
        left_out = before
        if k < length - 1:
            after = factors.narrow(dim, k + 1, length - k - 1).cumprod(dim)
            left_out = torch.cat(
                [before, after if k == 0 else before.expand_as(after) * after], dim
            )
        made.append((grad.narrow(dim, k, length - k) * left_out).sum(dim))
    return torch.stack(made, dim)


def _places(t: Tensor, dim: int) -> Tensor:
    """0, 1, … along a dimension, shaped to be compared with the other dimensions."""
    shape = [1] * t.dim()
    shape[dim] = t.shape[dim]
    return torch.arange(t.shape[dim], device=t.device).view(shape)


def _first_true(mask: Tensor, dim: int) -> Tensor:
    """The first place along a dimension where a mask is true; the length if there is none."""
    there, place = mask.max(dim, keepdim=True)
    return place.masked_fill_(~there, mask.shape[dim])


def _cumprod_backward(grad: Tensor, input: Tensor, output: Tensor, dim: int) -> Tensor:
    """In one pass over the dimension: before its first zero, at the zero, and zero after it.

    Between the first zero and the second, the gradient of what comes later is zero.
    The gradient of the first zero itself is the sum over the products without it.
    """
    is_zero = input == 0
    if is_zero.any().item() == 0:
        return cumprod_without_zeros(grad, input, output, dim)
    given, places = input.conj(), _places(input, dim)
    first = _first_true(is_zero, dim)
    at_first = places == first
    second = _first_true(is_zero.logical_and_(~at_first), dim)
    not_before = places >= first
    not_between = (places < first).logical_or_(places >= second)
    made = (output.conj() * grad).masked_fill_(not_before, 0.0).flip(dim)
    made = made.cumsum_(dim).flip(dim).div_(given).masked_fill_(not_before, 0.0)
    left_out = given.masked_fill(not_between | at_first, 1.0).cumprod_(dim)
    left_out = left_out.mul_(grad).masked_fill_(not_between, 0.0).sum(dim, keepdim=True)
    leading = output.conj().gather(dim, (first - 1).relu_()).masked_fill_(first == 0, 1.0)
    made = torch.where(at_first, left_out.mul_(leading), made)
    like = cumprod_without_zeros(_on_meta(grad), _on_meta(input), _on_meta(output), dim)
    return _laid_out_as(made, like)


def _evenly_distribute_backward(grad: Tensor, input: Tensor, value: Tensor) -> Tensor:
    mask = input.isnan() if value.isnan().item() else input == value
    return grad.new_zeros(input.shape).masked_fill_(mask, grad / mask.sum())


def _evenly_distribute_meta(grad: Tensor, input: Tensor, value: Tensor) -> Tensor:
    return grad.new_zeros(input.shape)


def _masked_fill_value_backward(grad: Tensor, mask: Tensor) -> Tensor:
    return grad.masked_select(mask).sum()


def _masked_fill_value_meta(grad: Tensor, mask: Tensor) -> Tensor:
    return grad.sum()


_KERNELS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "prod_backward": (_prod_backward, prod_without_zeros),
    "prod_dim_backward": (_prod_dim_backward, _prod_dim_meta),
    "cumprod_backward": (_cumprod_backward, cumprod_without_zeros),
    "evenly_distribute_backward": (_evenly_distribute_backward, _evenly_distribute_meta),
    "masked_fill_value_backward": (_masked_fill_value_backward, _masked_fill_value_meta),
}

for _name, (_kernel, _fake) in _KERNELS.items():
    _LIBRARY.define(f"{_name}{_SCHEMAS[_name]}")
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)
