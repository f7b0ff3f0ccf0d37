"""The emitted graphs: AOTAutograd's order, and exactly the calls that the schedule has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graph_capture.private_torch.compiler import aot_autograd, takes_boxed
from planner.compiled.compiled_plan import CompiledPlan
from planner.compiled.options import CompiledOptions
from planner.compiled.partition import Partitioner
from planner.compiled.step_so_far import StepSoFar
from tests.planner.compiled.models import model_and_sample, step


@cache
def _emitted(budget_bytes: int) -> tuple[list[GraphModule], CompiledPlan]:
    """Forward, backward and the plan of the small model."""
    model, x = model_and_sample()
    torch.compiler.reset()
    graphs: list[GraphModule] = []
    plans: list[CompiledPlan] = []

    def keep(module: GraphModule, _inputs: Sequence[Any]) -> Any:
        graphs.append(module)
        return takes_boxed(lambda given: module.forward(*given))

    options = {"budget_bytes": budget_bytes, "lower": "aot_eager", "on_plan": plans.append}
    partition = Partitioner(CompiledOptions.of(options), so_far=StepSoFar())
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    step(model, torch.compile(model, backend=backend), x)
    return graphs, plans[0]


def test_recomputation_survives() -> None:
    """Calls in the two graphs are those of the schedule, repetitions included."""
    graphs, plan = _emitted(400_000)
    counted = Counter(
        str(node.target)
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
        and ("addmm" in str(node.target) or "gelu" in str(node.target))
    )
    expected = Counter(plan.graph.operators[v].target for v in plan.schedule.order)
    assert counted == {t: n for t, n in expected.items() if "addmm" in t or "gelu" in t}
    assert counted["aten.gelu.default"] > 2


def test_backward_takes_what_forward_saves() -> None:
    """Saved tensors come first, then the tangents, under the same names as in forward."""
    (forward, backward), _ = _emitted(400_000)
    (output,) = forward.graph.find_nodes(op="output")
    saved = [n.name for n in output.args[0][1:] if isinstance(n, Node)]
    inputs = [n.name for n in backward.graph.find_nodes(op="placeholder")]
    assert inputs == [*saved, "tangents_1"]


def test_forward_takes_the_inputs_in_order() -> None:
    """Unused ones are there, too."""
    (forward, _), _ = _emitted(400_000)
    inputs = [n.name for n in forward.graph.find_nodes(op="placeholder")]
    assert inputs == [f"primals_{i + 1}" for i in range(len(inputs))]
