"""Decide which calls may run again, and how.

A call may be repeated if it computes the same bits from the same inputs and changes
nothing else. Three kinds need care: calls that draw random numbers (repeated from the
recorded generator state), batch normalization (repeated without touching the running
statistics), and choices that later calls follow (saved, so that a route never flips).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..calls.collectives import is_collective
from ..calls.formula_operators import PURE
from ..calls.writes import UNDECLARED_STATISTICS
from ..private_torch.operators import OpOverload, schema_of
from ..values.checks import is_check

aten = torch.ops.aten

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


def repeated_arguments(func: Any, args: tuple) -> tuple:
    """Return arguments for a repetition: batch statistics are computed, running ones unchanged.

    With ``training=True`` the output does not depend on the running
    statistics, so leaving them out changes no bit of it.
    """
    if func in UNDECLARED_STATISTICS and args[5]:
        return (*args[:3], None, None, *args[5:])
    return args


def repeats_without_writing(func: Any, args: tuple) -> bool:
    """Whether :func:`repeated_arguments` removes every effect of the call."""
    return func in UNDECLARED_STATISTICS and bool(args[5])


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
