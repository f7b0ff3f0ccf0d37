"""What Inductor would move or copy without the plan's knowledge."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from graph_capture.private_torch.inductor_fusion import KernelPlace, fusing_as_told, put
from planner.compiled import CompiledPlan
from planner.compiled.held_fusion import WithinMemory
from solvers.replay import replay
from tests.planner.compiled.models import compiled, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
        reason="Inductor needs a C++ compiler",
    ),
]


class _Made(Exception):
    """The plan is there; compiling it is not wanted."""


def _least_plan(model: nn.Module, *sample: Tensor) -> CompiledPlan:
    """The plan for the least budget that an error names."""
    told: list[CompiledPlan] = []

    def on_plan(plan: CompiledPlan) -> None:
        told.append(plan)
        raise _Made

    call, _ = compiled(model, lower="inductor", budget_bytes=1)
    least_bytes = _inner(lambda: step(model, call, *sample)).min_budget_bytes
    call, _ = compiled(model, lower="inductor", budget_bytes=least_bytes, on_plan=on_plan)
    _inner(lambda: step(model, call, *sample))
    return told[0]


def _inner(run: Callable[[], Any]) -> Any:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run()
    return caught.value.inner_exception


class Patches(nn.Module):
    """A convolution of an image into patches, as ViT begins, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for _ in range(3):
            x = x + self.down(F.gelu(self.up(x)))
        return x.square().mean()


@pytest.mark.slow
def test_copies_for_a_convolution_are_not_saved() -> None:
    """The image is half of the step; its copy in another layout would be alive in backward."""
    torch.manual_seed(0)
    plan = _least_plan(Patches(), torch.randn(8, 3, 64, 64))
    assert plan.predicted_peak_bytes <= 1.02 * replay(plan.graph, plan.schedule).peak_bytes


def _match(*runs: int) -> Any:
    """A pattern that matched calls of these runs, each of which reads one value."""
    graph, rules = Graph(), WithinMemory(memory_bytes=(0, 90, 0), limit_bytes=100)
    x = graph.call_function(torch.relu, (graph.placeholder("x"),))
    x.meta["val"] = torch.empty(5, device="meta")
    nodes = [graph.call_function(torch.neg, (x,)) for _ in runs]
    for node, run in zip(nodes, runs, strict=True):
        put(node, KernelPlace(run, True, rules))
    return type("Match", (), {"nodes": nodes, "__bool__": lambda _: True})()


def test_a_product_does_not_wait_for_a_far_addition() -> None:
    """Calls are replaced by one where the memory between them leaves room for what they read."""
    from torch._inductor import pattern_matcher

    with fusing_as_told():
        assert pattern_matcher.is_match(_match(0, 0))
        assert not pattern_matcher.is_match(_match(0, 2))
    assert pattern_matcher.is_match(_match(0, 2))
