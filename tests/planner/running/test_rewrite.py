"""Generated graphs against a count of what is alive in them, and against eager, bit by bit."""

from __future__ import annotations

import operator
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from benchmarks.testing.bitwise import assert_same_training
from benchmarks.testing.zoo import (
    ZOO,
    Case,
)
from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from planner import optimize
from planner.running.generators import (
    read_cpu_generator,
    resume_cpu_generator,
    rewind_cpu_generator,
)
from planner.running.planned_step import PlannedStep
from planner.running.rewrite import (
    PlannedGraphs,
    rewrite,
)
from solvers.instances import keep_all_peak_bytes
from solvers.portfolio import solve
from solvers.replay import InvalidScheduleError, replay
from solvers.schedule import Schedule
from tests.capturing import capture_step

MODELS = ["gpt2", "unet", "mixture_of_experts"]


def capture_case(case: Case, model: torch.nn.Module) -> CapturedStep:
    arguments = bind_call(model.forward, *split_sample(case.sample(0)))
    return capture_step(model, arguments, loss=case.loss_fn)


def random_schedule(graph: CostGraph, seed: int, num_repeats: int = 12) -> Schedule:
    """Keep-all with operators repeated at random places where their inputs are at hand."""
    draw = random.Random(seed)
    order = list(range(graph.num_operators))
    free = [v for v, op in enumerate(graph.operators) if op.pinned is None]
    while num_repeats:
        tried = list(order)
        tried.insert(draw.randrange(len(order) + 1), draw.choice(free))
        try:
            replay(graph, Schedule(tuple(tried)))
        except InvalidScheduleError:
            continue
        order, num_repeats = tried, num_repeats - 1
    return Schedule(tuple(order))


# -- an independent count ----------------------------------------------------------------


def storages(values: Any) -> dict[int, int]:
    """Bytes of the distinct storages in nested values."""
    return {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in tree_leaves(values)
        if isinstance(t, torch.Tensor)
    }


def run_call(node: Node, args: Any, kwargs: Any) -> Any:
    if node.target is read_cpu_generator:
        return torch.empty(5056, dtype=torch.uint8)
    silent = (rewind_cpu_generator, resume_cpu_generator, torch._C._set_grad_enabled)
    if node.target in silent:
        return None
    target = operator_of(node)
    assert target is operator.getitem or isinstance(target, torch._ops.OpOverload)
    return target(*args, **kwargs)


def operator_of(node: Node) -> Any:
    """The operator of the traced step that a node runs, by whatever function it calls it."""
    return node.meta.get("operator", node.target)


def walk(graph: Graph, inputs: list[Any], held: dict[int, int]) -> tuple[list[Any], int]:
    """Results of a generated graph on stand-ins, and its highest bytes beside the inputs' owner.

    ``held`` are storages that someone else keeps: they count once and throughout.
    """
    last_use = {arg: node for node in graph.nodes for arg in node.all_input_nodes}
    values: dict[Node, Any] = {}
    given = iter(inputs)
    peak = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
            continue
        if node.op == "output":
            return torch.fx.map_arg(node.args[0], lambda n: values[n]), peak
        args = torch.fx.map_arg(node.args, lambda n: values[n])
        kwargs = torch.fx.map_arg(node.kwargs, lambda n: values[n])
        values[node] = run_call(node, args, kwargs)
        peak = max(peak, sum((storages(list(values.values())) | held).values()))
        args = kwargs = None
        for dead in [n for n in values if last_use.get(n, n) is node]:
            del values[dead]
    raise AssertionError("a graph without an output")


def counted_peak_bytes(captured: CapturedStep, graphs: PlannedGraphs) -> int:
    """Peak of the generated code, scratch of kernels aside."""
    step = captured.step
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def stand_in(node: Node) -> torch.Tensor:
            value = node.meta["val"]
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

        given: dict[Node, torch.Tensor] = {}
        for node in (*graphs.forward_inputs, *graphs.saved_inputs):
            given.setdefault(node, stand_in(node))
        placeholders = [
            n for n in step.graph.find_nodes(op="placeholder") if n.meta["role"] != "tangent"
        ]
        resident = storages([given.setdefault(n, stand_in(n)) for n in placeholders])
        results, forward_peak = walk(
            graphs.forward.graph, [given[n] for n in graphs.forward_inputs], resident
        )
        outputs, saved = results[: graphs.num_outputs], results[graphs.num_outputs :]
        tangents = [stand_in(n) for n in step.tangents]
        held = resident | storages(outputs)
        held[-1] = step.loss.held_bytes
        held |= storages([t for t in tangents if t.numel() <= 1])
        at_loss = sum((held | storages([tangents, saved])).values())
        exposed, private = saved[: graphs.num_exposed], saved[graphs.num_exposed :]
        boxed = [*tangents, *exposed, *(given[n] for n in graphs.saved_inputs), *private]
        tangents = saved = exposed = private = results = []
        _, backward_peak = walk(graphs.backward.graph, boxed, held)
    assert mode is not None
    return max(forward_peak, at_loss, backward_peak) + step.loss.constant_bytes


def without_scratch(graph: CostGraph) -> CostGraph:
    operators = tuple(replace(op, workspace_bytes=0) for op in graph.operators)
    return CostGraph(operators, graph.storages)


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_the_generated_code_holds_what_replay_says(name, share):
    """Counting live storages along the generated graphs gives replay's peak to the byte."""
    case = ZOO[name]("tiny")
    captured = capture_case(case, model := case.make())
    schedule = Schedule.keep_all(captured.graph)
    if share < 1:
        resident = captured.graph.resident_bytes
        room = keep_all_peak_bytes(captured.graph) - resident
        found = solve(captured.graph, int(resident + share * room), time_limit_s=1)
        schedule = found.schedule
    graphs = rewrite(captured, schedule)
    expected = replay(without_scratch(captured.graph), schedule).peak_bytes
    assert counted_peak_bytes(captured, graphs) == expected
    assert model.training


# -- bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_random_schedules_have_the_same_bits(name, seed):
    """Whatever valid schedule is rewritten, training it gives eager's bits."""
    case = ZOO[name]("tiny")

    def apply(model: torch.nn.Module) -> torch.nn.Module:
        captured = capture_case(case, model)
        schedule = random_schedule(captured.graph, seed)
        step = PlannedStep(model, captured, rewrite(captured, schedule))
        forward = model.forward
        model.forward = lambda *args, **kwargs: step(bind_call(forward, args, kwargs))
        return model

    assert_same_training(case.build, apply, case.sample, loss_fn=case.loss_fn, steps=2)


@pytest.mark.parametrize("name", MODELS)
def test_keeping_all_emits_each_call_once(name):
    """With nothing recomputed there are as many calls as the traced step has, views aside."""
    case = ZOO[name]("tiny")
    captured = capture_case(case, model := case.make())
    graphs = rewrite(captured, Schedule.keep_all(captured.graph))
    emitted = [*graphs.forward.graph.nodes, *graphs.backward.graph.nodes]

    def owning(nodes: Any) -> list[str]:
        return sorted(
            str(operator_of(n))
            for n in nodes
            if isinstance(operator_of(n), torch._ops.OpOverload)
            and not operator_of(n).is_view
            and operator_of(n)
            is not torch.ops.aten._unsafe_view.default  # a view, whatever it says
            and not any(a.alias_info is not None for a in operator_of(n)._schema.returns)
        )

    calls = [call for code in captured.code for call in code.calls]
    assert len(owning(emitted)) == len(owning(calls))
    assert not any(n.target in (read_cpu_generator, rewind_cpu_generator) for n in emitted)
    assert model.training


def test_a_schedule_that_reads_too_early_is_refused():
    """A schedule that replay refuses does not become code that reads garbage."""
    case = ZOO["gpt2"]("tiny")
    captured = capture_case(case, model := case.make())
    order = list(range(captured.graph.num_operators))
    first = next(
        v for v, op in enumerate(captured.graph.operators) if op.outputs and captured.code[v].calls
    )
    order.remove(first)
    with pytest.raises(InvalidScheduleError):
        rewrite(captured, Schedule(tuple(order)))
    assert model.training


def test_a_view_that_leads_back_is_not_made():
    """The weight that backward multiplies with is the weight, not its transpose transposed."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).train()
    plan = optimize(model, torch.zeros(4, 8), budget_gb=1, loss_fn=torch.sum)
    graphs = rewrite(plan._live.captured, plan.schedule)
    weights = [n for n in graphs.backward.graph.nodes if n.name.startswith("parameter_1_weight")]
    users = [user.target for weight in weights for user in weight.users]
    assert users == ["mm"]
