"""How a compiled step is asked for: without a budget, at PyTorch's ratio, or within ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from graph_capture.private_torch.compiler import backend_named, functorch_config

from ..compiled import CompiledPlan
from ..compiled.options import Lower

UNLIMITED_BYTES = 10**15
"""A budget that limits nothing."""


class Planned(Exception):
    """A plan is there; compiling it is not wanted."""

    def __init__(self, plan: CompiledPlan) -> None:
        super().__init__()
        self.plan = plan


def stop_with(plan: CompiledPlan) -> NoReturn:
    """Be told of a plan, by ``on_plan``, and compile nothing.

    Raises
    ------
    Planned
        Always.
    """
    raise Planned(plan)


def within_ratio(lower: Lower, ratio: float) -> Callable[..., Any]:
    """PyTorch's ``activation_memory_budget``.

    A backend of its own for each ratio, so that Dynamo takes no other's code.
    """
    backend, config = backend_named(lower), functorch_config()

    def compile_within(module: torch.fx.GraphModule, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=ratio, enable_autograd_cache=False):
            return backend(module, inputs)

    return compile_within


def remat_options(
    budget_bytes: int,
    on_plan: Callable[[CompiledPlan], object] | None,
    *,
    lower: Lower,
    outside_bytes: int,
    search: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Options of backend ``"remat"``.

    Parameters
    ----------
    budget_bytes, on_plan, lower
        The options of these names.
    outside_bytes
        What is there all step long and not in the graph.
    search
        How hard it searches.
    """
    return {
        **search,
        "budget_bytes": budget_bytes,
        "lower": lower,
        "on_plan": on_plan,
        "resident_bytes": outside_bytes,
    }


__all__ = ["UNLIMITED_BYTES", "Planned", "remat_options", "stop_with", "within_ratio"]
