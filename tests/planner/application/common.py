"""What tests of planned modules share: the same training on a plain and a planned one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.testing.bitwise import (
    assert_same_tensors,
)
from planner import (
    Plan,
)
from tests.planner.small import Net, make


def gradients(model: nn.Module) -> dict[str, Any]:
    return {f"gradient of {name}": p.grad for name, p in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Any]:
    return {**gradients(model), **model.state_dict(), "generator": torch.get_rng_state()}


def assert_same_after(
    run: Callable[[nn.Module], object], plan: Plan, kind: Callable[[], nn.Module] = Net
) -> None:
    """Run the same training code on a plain and on a planned model and compare all bits."""
    plain, planned = make(kind), plan.apply(make(kind))
    torch.manual_seed(1)
    run(plain)
    expected = copy.deepcopy(state(plain))
    torch.manual_seed(1)
    run(planned)
    assert_same_tensors(expected, state(planned))
