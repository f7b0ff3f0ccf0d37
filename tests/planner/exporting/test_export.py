"""What other tools can do of a plan, and whether it is what they then do."""

from __future__ import annotations

import ast
import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from planner import ExportTarget, Plan, PlanError, measure, optimize
from planner.exporting.choice import Judge, Setting
from planner.exporting.layers import groups, outermost, spread, subsets
from planner.exporting.operator_policy import calls_by_worth
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies.blocks import module_blocks


class _Layer(nn.Module):
    """What a transformer's layer does to memory: a norm, a wide product, a narrow one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


class _Stack(nn.Module):
    def __init__(self, depth: int = 6, width: int = 32) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=False)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


SAMPLE = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def _make() -> _Stack:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return _Stack()


@pytest.fixture(scope="module")
def plan() -> Plan:
    """At 60 % of the peak."""
    return optimize(_make(), SAMPLE, budget="60%", loss_fn=_loss, time_limit_s=1)


@pytest.mark.parametrize("to", ExportTarget)
def test_every_export_fits_and_says_what_it_loses(plan: Plan, to: str) -> None:
    """Within the budget, no faster than proven possible, from the same two figures."""
    found = plan.export(to)
    assert found.fits
    assert found.peak_bytes <= plan.budget_bytes
    assert found.least_budget_bytes == found.peak_bytes
    assert found.step_us >= plan.lower_bound_us
    assert found.extra_time == pytest.approx(found.step_us / plan.predicted_step_us - 1)
    assert f"{found.extra_time:+.2%} over the plan" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["layers"] == [f"layers.{i}" for i in range(6)]
    assert str(found).endswith(found.code)


@pytest.mark.parametrize("to", ["lightning", "selective"])
def test_the_code_does_what_was_predicted(plan: Plan, to: str) -> None:
    """The measured peak of a step with the exported code is the predicted one, within 2 %."""
    found, model = plan.export(to), _make()
    names: dict[str, Any] = {"model": model}
    exec(found.code, names)
    if to == "lightning":
        names["configure_model"](SimpleNamespace(model=model))
        names["configure_model"](SimpleNamespace(model=model))  # Lightning may call it again
    measured = measure(model, SAMPLE, loss_fn=_loss, repeats=1)
    assert found.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.02)
    assert found.peak_bytes < plan.baseline_peak_bytes * 0.65


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "share"), [(0.1, "60%"), (0.1, "45%"), (0.0, "60%")])
def test_transformers_checkpoint_what_was_predicted(dropout: float, share: str) -> None:
    """GPT-2 with some layers switched on has the predicted peak, within a thousandth."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=6,
        n_embd=128,
        n_head=4,
        vocab_size=1000,
        n_positions=128,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, 1000, (8, 128))
    call = {"input_ids": tokens, "labels": tokens}
    plan = optimize(model, call, budget=share, time_limit_s=1)
    for to, rel in (("transformers", 1e-3), ("lightning", 1e-3), ("selective", 0.05)):
        found, other = plan.export(to), copy.deepcopy(model)
        names: dict[str, Any] = {"model": other}
        exec(found.code, names)
        if to == "lightning":
            names["configure_model"](SimpleNamespace(model=other))
        measured = measure(other, call, repeats=1)
        assert found.peak_bytes == pytest.approx(measured.peak_bytes, rel=rel), to
        assert measured.peak_bytes <= plan.budget_bytes * 1.001, to


@pytest.mark.parametrize("to", ExportTarget)
def test_all_the_memory_needs_no_checkpoint(plan: Plan, to: str) -> None:
    """Every tool is told to leave it."""
    roomy = replace(plan, budget_bytes=plan.baseline_peak_bytes)
    found = roomy.export(to)
    assert found.checkpointed == ()
    assert (found.peak_bytes, found.fits) == (roomy.baseline_peak_bytes, True)


def test_where_no_layer_suffices_the_least_budget_is_said(plan: Plan) -> None:
    """Below what per-layer checkpointing can reach the answer needs another budget, which fits."""
    tight = replace(plan, budget_bytes=plan.baseline_peak_bytes // 4)
    found = tight.export("transformers")
    assert not found.fits
    assert found.least_budget_bytes > tight.budget_bytes
    assert f"it needs a budget of {found.least_budget_bytes / 1e6:.3g} MB" in str(found)
    assert replace(plan, budget_bytes=found.least_budget_bytes).export("transformers").fits


def test_the_code_is_python(plan: Plan) -> None:
    """But for Megatron's flags."""
    for to in set(ExportTarget) - {ExportTarget.MEGATRON}:
        ast.parse(plan.export(to).code)
    assert plan.export("megatron").code.startswith("--recompute-granularity full")


def test_a_model_that_is_no_stack_is_refused() -> None:
    """There are no layers that a tool could be told."""
    plan = optimize(nn.Linear(8, 8), torch.zeros(4, 8), budget_gb=1, loss_fn=torch.sum)
    with pytest.raises(PlanError, match="no stack of layers"):
        plan.export("transformers")


def test_the_judge_counts_eagers_own_memory(plan: Plan) -> None:
    """Nothing checkpointed is the step without a plan, in peak and time."""
    nothing = Setting(schedule=Schedule.keep_all(plan.graph))
    found = Judge(plan).judge(nothing)
    assert found.peak_bytes == plan.baseline_peak_bytes
    assert found.step_us == pytest.approx(plan.baseline_step_us)


def test_more_layers_take_less_memory_and_more_time(plan: Plan) -> None:
    """In each of the orders in which layers are taken."""
    blocks = module_blocks(plan.graph)
    for family in subsets(plan, blocks):
        settings = list(family)
        assert [len(s.layers) for s in settings] == list(range(7))
        outcomes = [replay(plan.graph, s.schedule) for s in settings]
        costs = [outcome.cost_ns for outcome in outcomes]
        assert costs == sorted(costs)
        assert outcomes[-1].peak_bytes < outcomes[0].peak_bytes


def test_groups_of_layers(plan: Plan) -> None:
    """Megatron's must be of one size."""
    blocks = module_blocks(plan.graph)
    assert [s.group_size for s in groups(plan.graph, blocks, even=True)] == [1, 2, 3, 6]
    assert [s.group_size for s in groups(plan.graph, blocks, even=False)] == [1, 2, 3, 4, 5, 6]


def test_an_even_spread() -> None:
    """Every beginning of the order is spread over the row."""
    assert spread(list("abcdefgh")) == ("a", "e", "c", "g", "b", "f", "d", "h")
    assert sorted(spread(list("abcdef"))) == list("abcdef")


def test_layers_within_layers(plan: Plan) -> None:
    """Transformers has a flag for the outer ones; what wraps any module may take the inner ones."""
    blocks = module_blocks(plan.graph)
    inner = [
        replace(block, name=f"{block.name.replace('layers', 'block')}.part.{half}", begin=b, end=e)
        for block in blocks.blocks
        for half, (b, e) in enumerate(
            [
                (block.begin, (block.begin + block.end) // 2),
                ((block.begin + block.end) // 2, block.end),
            ]
        )
    ]
    outer = outermost(replace(blocks, blocks=tuple(inner)))
    assert [block.name for block in outer.blocks] == [f"block.{i}" for i in range(6)]
    assert [(b.begin, b.end) for b in outer.blocks] == [(b.begin, b.end) for b in blocks.blocks]


def test_what_is_written_over_is_not_saved() -> None:
    """PyTorch refuses to cache a call's output that a later call changes in place."""

    class Rude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.gelu(self.second(torch.tanh(self.first(x).mul_(0.5))))

    model = nn.Sequential(*(Rude() for _ in range(4)))
    plan = optimize(model, SAMPLE, budget="100%", loss_fn=_loss)
    targets = {operator.target for operator in plan.graph.operators}
    assert targets >= {"aten.addmm.default", "aten.addmm.default+aten.mul_.Tensor"}
    calls = calls_by_worth(plan.graph, module_blocks(plan.graph).blocks)
    assert "aten.tanh.default" in calls
    assert "aten.addmm.default" not in calls
