"""Decide which calls may run again, and how.

A call may be repeated if it computes the same bits from the same inputs and changes
nothing else. Three kinds need care: calls that draw random numbers (repeated from the
recorded generator state), batch normalization (repeated without touching the running
statistics), and choices that later calls follow (saved, so that a route never flips).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from .checks import is_check
from .collectives import is_collective
from .formula_operators import PURE
from .private_torch.operators import OpOverload, schema_of
from .private_torch.trees import tree_iter

aten = torch.ops.aten

# Batch normalizations that update running_mean and running_var (arguments 3, 4) although
# their schema does not say so.
_UNDECLARED_STATISTICS = {
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
}

_CHOICES = {
    "aten::topk",
    "aten::sort",
    "aten::argsort",
    "aten::argmax",
    "aten::argmin",
    "aten::kthvalue",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::multinomial",
    "aten::randperm",
}

_PURE_NAMESPACES = {"aten", "prims", "torchvision"}


def written_arguments(func: OpOverload, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the tensors that the call writes to, by its schema."""
    written: list[torch.Tensor] = []
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[i] if i < len(args) else None)
        written.extend(t for t in tree_iter(value) if isinstance(t, torch.Tensor))
    return written


def hidden_writes(func: Any, args: tuple) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a call writes to although its schema does not say so."""
    if func in _UNDECLARED_STATISTICS and args[5]:
        return tuple(t for t in args[3:5] if t is not None)
    return ()


def repeated_arguments(func: Any, args: tuple) -> tuple:
    """Return arguments for a repetition: batch statistics are computed, running ones unchanged.

    With ``training=True`` the output does not depend on the running
    statistics, so leaving them out changes no bit of it.
    """
    if func in _UNDECLARED_STATISTICS and args[5]:
        return (*args[:3], None, None, *args[5:])
    return args


def repeats_without_writing(func: Any, args: tuple) -> bool:
    """Whether :func:`repeated_arguments` removes every effect of the call."""
    return func in _UNDECLARED_STATISTICS and bool(args[5])


def draws(node: Node) -> bool:
    """Whether the call draws from a random generator."""
    return draws_now(node.target, node.args, node.kwargs)


def draws_now(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments draws from a random generator."""
    if not isinstance(func, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.name == "dropout_p":
            value = kwargs.get("dropout_p", args[i] if i < len(args) else argument.default_value)
            return bool(value)
    return True


def why_pinned(node: Node) -> str | None:
    """Return why the call must run exactly once, or ``None``."""
    func = node.target
    assert isinstance(func, OpOverload)
    if schema_of(func).name in _CHOICES:
        return "its choice decides what later calls read"
    if is_check(func):
        return "a check of what the plan was made for"
    if is_collective(func):
        return "a collective, which all ranks would have to repeat"
    if func.namespace not in _PURE_NAMESPACES and schema_of(func).name not in PURE:
        return "a custom operator; what else it does is unknown"
    if any(isinstance(v, torch.Generator) for v in (*node.args, *node.kwargs.values())):
        return "draws from a generator of its own"
    return None
