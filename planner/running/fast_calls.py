"""Call PyTorch's own Python functions if they dispatch to exactly the graph's operator.

``torch.ops.aten.add.Tensor(a, b)`` takes a generic path that boxes every argument.
``torch.add(a, b)`` is the same call at half the cost, which matters in models with small
kernels. Which overload a Python function reaches depends on its arguments. So each kind
of call is tried once, on stand-ins, under a mode that looks at the first operator
dispatched and stops there. The function is used only if that is the graph's operator
with the graph's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodDescriptorType
from typing import Any

import torch
from torch.fx import Node

from graph_capture.private_torch.aten import to_copy
from graph_capture.private_torch.dispatch import (
    TorchDispatchMode,
    below_autograd,
    without_autocast,
    without_torch_function,
)
from graph_capture.private_torch.operators import (
    FUNCTION_TABLES,
    OpOverload,
    qualified_name_of,
    schema_of,
)
from graph_capture.private_torch.trees import tree_flatten, tree_map

_Found = Callable[..., Any] | str | None  # a function, the name of a method of Tensor, neither


def fast_call(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> _Found:
    """Return what to call instead of an operator, with the same arguments.

    Parameters
    ----------
    func
        An operator of ``torch.ops.aten``; others have no such function.
    args, kwargs
        The call's arguments, with nodes of a traced step for tensors.

    Returns
    -------
    Callable, str or None
        A function of PyTorch, the name of a method of its first argument, or
        ``None`` if only the operator itself works.
    """
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return None
    nodes = [x for x in tree_flatten((args, dict(kwargs)))[0] if isinstance(x, Node)]
    if not nodes or not all(isinstance(n.meta["val"], torch.Tensor) for n in nodes):
        return None  # without a tensor, the default device may matter
    kind = _kind(func, args, kwargs)
    if kind not in _known:
        _known[kind] = _find(func, args, kwargs)
    return _known[kind]


_known: dict[Any, _Found] = {}  # never outdated: a function always reaches the same operator


def _kind(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What the choice of an overload depends on."""
    leaves, spec = tree_flatten((args, dict(kwargs)))
    return func, spec, tuple(map(_looks, leaves))


def _looks(leaf: Any) -> Any:
    if isinstance(leaf, Node):
        value = leaf.meta["val"]
        return "tensor", value.dim() == 0, value.dtype
    return leaf if isinstance(leaf, torch.dtype) else type(leaf)


# Composites that call another operator with the number as a tensor; the function reaches that
# operator directly.
_WITH_NUMBER = {
    getattr(torch.ops.aten, name).Scalar: getattr(torch.ops.aten, name).Tensor
    for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
}


class _Seen(Exception):
    """The first operator was dispatched."""


class _First(TorchDispatchMode):
    """Look at the first operator that is dispatched, without running it."""

    def __init__(self) -> None:
        super().__init__()
        self.call: tuple[Any, tuple, dict] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.call = func, args, kwargs or {}
        raise _Seen


def _find(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> _Found:
    def stand_in(x: Any) -> Any:
        if not isinstance(x, Node):
            return x
        value = x.meta["val"]
        shape = (1,) * value.dim()
        return torch.empty(shape, dtype=value.dtype, device="meta")

    made: dict[Node, Any] = {}

    def value_of(x: Any) -> Any:
        if isinstance(x, Node) and x not in made:
            made[x] = stand_in(x)
        return made[x] if isinstance(x, Node) else x

    given, named = tree_map(value_of, args), tree_map(value_of, dict(kwargs))
    name = schema_of(func).name.removeprefix("aten::")
    if func is to_copy.default and named.keys() == {"dtype"}:
        return "to" if named["dtype"] != given[0].dtype else None  # otherwise it copies nothing
    candidates: list[_Found] = []
    if given and isinstance(given[0], torch.Tensor) and _is_compiled(name):
        candidates.append(name)
    functions = [getattr(library, name) for library in FUNCTION_TABLES if hasattr(library, name)]
    candidates += [f for f in functions if _is_found_by_name(f)]
    return next((c for c in candidates if _comes_to(c, func, given, named)), None)


def _is_found_by_name(function: Any) -> bool:
    """Whether generated code, which names functions, would call this one.

    For ``block_diag`` and a few others, PyTorch has a wrapper of the same name with
    different arguments.
    """
    try:
        parts = qualified_name_of(function).split(".")
    except RuntimeError:  # it has none, like unique_dim
        return False
    found: Any = torch
    for part in parts[1:]:
        found = getattr(found, part, None)
    return bool(found == function)


def _is_compiled(name: str) -> bool:
    """Whether a method is the binding of an operator and returns exactly what it returns.

    A method written in Python may return something else: the operator
    ``unique_consecutive`` makes three tensors, ``Tensor.unique_consecutive`` returns one.
    """
    return isinstance(getattr(torch.Tensor, name, None), MethodDescriptorType)


def _comes_to(candidate: _Found, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    first = _First()
    try:
        with (
            torch.no_grad(),
            below_autograd(),
            without_autocast(),
            without_torch_function(),
            first,
        ):
            if isinstance(candidate, str):
                getattr(args[0], candidate)(*args[1:], **kwargs)
            else:
                assert candidate is not None
                candidate(*args, **kwargs)
    except _Seen:
        pass
    except (TypeError, RuntimeError, NotImplementedError, ValueError, IndexError):
        return False  # it takes other arguments
    if first.call is None:
        return False
    called, its_args, its_kwargs = first.call
    if not kwargs.get("pin_memory"):  # functions pass it, operators leave it out
        its_kwargs = {k: v for k, v in its_kwargs.items() if k != "pin_memory" or v}
    wanted = (_WITH_NUMBER.get(func, func), func)
    return called in wanted and _same((its_args, its_kwargs), (args, kwargs))


def _same(a: Any, b: Any) -> bool:
    """Whether two calls are equal: tensors by identity, lists and tuples of any kind by items."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if a is b:
        return True
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)
