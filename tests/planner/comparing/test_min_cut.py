"""PyTorch's min-cut partitioner on our graph: known saved sets, valid schedules, equal bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config, partitioners

from benchmarks.testing.zoo import (
    ZOO,
    Case,
)
from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from planner import optimize
from planner.comparing.min_cut import BUDGETS, min_cut_strategy, saved_storages
from solvers.replay import replay
from solvers.strategies import StrategyError, apply_strategy, schedule_for_saved
from tests.capturing import capture_step

from ..small import Net, make, sample

WIDTH, ROWS = 8, 64
ACTIVATION = 4 * ROWS * WIDTH


class Waves(nn.Module):
    """One hidden layer: a matrix product, a sine, a GELU, a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x).sin()))


def step_of(model: nn.Module, sample_input: Any, loss: Any = None) -> CapturedStep:
    """The step of a model, without its scratch memory."""
    arguments = bind_call(model.forward, *split_sample(sample_input))
    return capture_step(model, arguments, loss=loss, measure_scratch=False)


def step_of_case(case: Case) -> CapturedStep:
    """The step of a model of the zoo."""
    with case.context():
        return step_of(case.make(), case.sample(0), case.loss_fn)


@pytest.fixture(scope="module")
def waves() -> CapturedStep:
    """The step of :class:`Waves`."""
    return step_of(make(Waves), torch.zeros(ROWS, WIDTH))


@pytest.mark.parametrize(
    ("budget", "saved", "again"),
    [
        # The product is banned as not on its list of what may run again, the GELU as the second
        # product's backward takes it whole; the sine is fused into what reads it.
        (1.0, ["addmm", "gelu"], ["sin"]),
        # First the ban of what the backward takes whole falls. What is left, half of all bytes,
        # is less than 0.9 and than 0.6: the answer to both.
        (0.9, ["addmm"], ["sin", "gelu"]),
        (0.6, ["addmm"], ["sin", "gelu"]),
        # The product alone is what the knapsack packs. Half of all fits in 0.5, not in 0.4.
        (0.5, ["addmm"], ["sin", "gelu"]),
        (0.4, [], ["addmm", "sin", "gelu"]),
        (0.0, [], ["addmm", "sin", "gelu"]),
    ],
)
def test_saves_and_recomputes_what_was_worked_out_by_hand(
    waves: CapturedStep, budget: float, saved: list[str], again: list[str]
) -> None:
    """What is saved, what runs twice, and the peak are those of a calculation on paper."""
    outcome = apply_strategy(min_cut_strategy(waves, (budget,)), waves.graph)
    names = [op.target.removeprefix("aten.").split(".")[0] for op in waves.graph.operators]
    storages = waves.graph.storages
    producers = [storages[k].producer for k in sorted(saved_storages(waves, budget))]
    assert [names[v] for v in producers if v is not None] == saved
    order = outcome.schedule.order
    assert sorted(names[v] for v in set(order) if order.count(v) == 2) == sorted(again)
    assert len(order) == waves.graph.num_operators + len(again)
    # Input, output and its gradient are there all the time, with the loss that the loop holds.
    # At the peak product, sine and GELU are beside the gradient of the sine or of the GELU.
    parameters = 2 * 4 * (WIDTH * WIDTH + WIDTH)
    assert outcome.peak_bytes == parameters + (3 + 4) * ACTIVATION + 4
    assert outcome.setting == f"budget={budget:g}"


def test_without_a_budget_the_default_is_taken_and_nothing_else_asked(
    waves: CapturedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first candidate is PyTorch's default, and the partitioner runs once for it."""
    asked = []
    partition = partitioners.min_cut_rematerialization_partition

    def counting(
        module: Any, inputs: Any, *, num_fwd_outputs: int, static_lifetime_input_indices: Any
    ) -> Any:
        asked.append(config.activation_memory_budget)
        return partition(
            module,
            inputs,
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_indices=static_lifetime_input_indices,
        )

    monkeypatch.setattr(partitioners, "min_cut_rematerialization_partition", counting)
    strategy = min_cut_strategy(waves)
    assert apply_strategy(strategy, waves.graph).setting == "budget=1"
    assert apply_strategy(strategy, waves.graph).num_candidates == 1
    assert asked == [1.0]


def test_the_configuration_is_put_back(waves: CapturedStep) -> None:
    """torch's own settings are afterwards what they were."""
    before = config.get_config_copy()
    saved_storages(waves, 0.4)
    assert config.get_config_copy() == before


def test_another_steps_graph_is_refused(waves: CapturedStep) -> None:
    """A saved set of one step means nothing on another."""
    with pytest.raises(StrategyError, match="made for another step"):
        apply_strategy(min_cut_strategy(waves), CostGraph((), ()))


def test_a_torch_without_a_fitting_partitioner_is_an_error_that_says_so(
    waves: CapturedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partitioner that takes other arguments is not called."""
    monkeypatch.setattr(partitioners, "min_cut_rematerialization_partition", lambda module: None)
    with pytest.raises(StrategyError, match=r"cannot be asked on torch .*takes module"):
        saved_storages(waves)


def test_a_partitioner_that_fails_is_a_strategy_that_does_not_apply(
    waves: CapturedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error is named, with the budget."""

    def failing(*_: Any, num_fwd_outputs: int, static_lifetime_input_indices: Any) -> Any:
        raise AssertionError("node x was invalid")

    monkeypatch.setattr(partitioners, "min_cut_rematerialization_partition", failing)
    with pytest.raises(StrategyError, match=r"fails at budget 0\.5: AssertionError: node x"):
        saved_storages(waves, 0.5)


@pytest.mark.parametrize("budgets", [(), (1.1,), (0.5, -0.1)])
def test_budgets_out_of_range_are_refused(waves: CapturedStep, budgets: tuple[float, ...]) -> None:
    """The partitioner knows shares from 0 to 1."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        min_cut_strategy(waves, budgets)


def test_the_step_gives_equal_bits_when_it_runs_so() -> None:
    """Dropout and batch norm included, a step by the partitioner's choice is eager's."""
    model = make(Net)
    plan = optimize(model, sample(), budget_gb=1.0)
    assert plan._live is not None
    outcome = apply_strategy(min_cut_strategy(plan._live.captured, (0.4,)), plan.graph)
    again = len(outcome.schedule.order) - plan.graph.num_operators
    assert again > 5
    found = replace(plan, schedule=outcome.schedule).validate(model, sample(), repeats=1)
    assert found.bits == "equal"
    assert found.peak.measured == pytest.approx(outcome.peak_bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "resnet50", "lstm", "convnext"])
def test_gives_valid_schedules_that_save_less_as_less_is_asked_for(name: str) -> None:
    """On models of the zoo replay accepts every candidate, and saved bytes do not rise."""
    captured = step_of_case(ZOO[name]("tiny"))
    graph = captured.graph
    asked = (BUDGETS[0], BUDGETS[4], BUDGETS[-1])
    saved = [saved_storages(captured, budget) for budget in asked]
    costs = [replay(graph, schedule_for_saved(graph, storages)).cost_ns for storages in saved]
    assert costs[0] < costs[1] < costs[2]
    num_bytes = [sum(graph.storages[k].size_bytes for k in storages) for storages in saved]
    assert num_bytes[0] > num_bytes[1] > num_bytes[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_encoder", "mlp_frozen"])
def test_saves_the_very_bytes_that_torch_compile_saves(name: str) -> None:
    """On torch.compile's own joint graph the partitioner saves as much, budget by budget."""
    case = ZOO[name]("tiny")
    captured, model = step_of_case(case), case.make()
    asked = (1.0, 0.8, 0.4, 0.2)
    theirs: dict[float, int] = {}

    def partition(
        module: Any, inputs: Any, *, num_fwd_outputs: int, static_lifetime_input_indices: Any
    ) -> Any:
        for budget in asked:
            graph = torch.fx.Graph()
            graph.output(graph.graph_copy(module.graph, {}))
            with config.patch(activation_memory_budget=budget):
                parts = partitioners.min_cut_rematerialization_partition(
                    torch.fx.GraphModule(module, graph),
                    inputs,
                    num_fwd_outputs=num_fwd_outputs,
                    static_lifetime_input_indices=static_lifetime_input_indices,
                )
            (outputs,) = parts[0].graph.find_nodes(op="output")[0].args
            theirs[budget] = _bytes_of(outputs[num_fwd_outputs:])
        return parts

    def as_it_is(module: Any, _: Any) -> Any:
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=partition)
    torch._dynamo.reset()
    args, kwargs = split_sample(case.sample(0))
    torch.compile(model, backend=backend)(*args, **kwargs)
    ours = {
        budget: sum(captured.graph.storages[k].size_bytes for k in saved_storages(captured, budget))
        for budget in asked
    }
    assert ours == theirs


def _bytes_of(nodes: list[Any]) -> int:
    """Bytes of the storages behind nodes, those of placeholders left out."""
    of_storage = {
        n.meta["val"].untyped_storage()._cdata: n.meta["val"].untyped_storage().nbytes()
        for n in nodes
        if isinstance(n, torch.fx.Node) and n.op != "placeholder"
    }
    return sum(of_storage.values())
