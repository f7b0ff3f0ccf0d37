"""What Inductor would move or copy without the plan's knowledge."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from graph_capture.private_torch.fake_tensors import FakeTensorMode
from graph_capture.private_torch.inductor import generate_code
from graph_capture.private_torch.inductor_fusion import KernelPlace, fusing_as_told, put
from planner.compiled import CompiledPlan
from solvers.replay import replay
from tests.planner.compiled.models import compiled, step
from tests.planner.compiled.test_held_fusion import rules

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
        reason="Inductor needs a C++ compiler",
    ),
]


ATEN = torch.ops.aten


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
    graph, held = Graph(), rules((0, 90, 0), 100)
    x = graph.call_function(torch.relu, (graph.placeholder("x"),))
    x.meta["val"] = torch.empty(5, device="meta")
    nodes = [graph.call_function(torch.neg, (x,)) for _ in runs]
    for node, run in zip(nodes, runs, strict=True):
        put(node, KernelPlace(run, True, held))
    return type("Match", (), {"nodes": nodes, "__bool__": lambda _: True})()


def test_a_product_does_not_wait_for_a_far_addition() -> None:
    """Calls are replaced by one where the memory between them leaves room for what they read."""
    from torch._inductor import pattern_matcher

    with fusing_as_told():
        assert pattern_matcher.is_match(_match(0, 0))
        assert not pattern_matcher.is_match(_match(0, 2))
    assert pattern_matcher.is_match(_match(0, 2))


@pytest.mark.parametrize(("made", "num_calls"), [(0, 1), (10, 2)])
def test_a_function_ends_where_memory_has_to_be_freed(made: int, num_calls: int) -> None:
    """Two loops that follow each other are one function, unless their results take too much."""
    held = rules((90, 90), 100, made=(0, made))
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = FakeTensorMode().from_tensor(torch.empty(64))
    results = [graph.call_function(f, (x,)) for f in (ATEN.sin.default, ATEN.sum.default)]
    for run, node in enumerate(results):
        node.meta["val"] = node.target(x.meta["val"])  # type: ignore[operator]
        put(node, KernelPlace(run, True, held))
    graph.output(tuple(results))
    code = generate_code(GraphModule({}, graph), [x.meta["val"]], is_backward=False, num_visible=2)
    assert len(re.findall(r"^ +cpp_fused\w+\(", code.text, re.MULTILINE)) == num_calls
