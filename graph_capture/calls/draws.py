"""Whether a call draws random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..private_torch.operators import OpOverload, schema_of


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
