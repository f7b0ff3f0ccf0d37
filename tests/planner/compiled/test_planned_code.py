"""Planned steps whose stretches are compiled: numbers, memory, what stays eager."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import planner.plan
from planner import Plan, PlanError, PlanWarning, applied_blocks, applied_plan, optimize
from planner.base.forward_slot import stand_in_of
from planner.compiled import planned_code
from planner.compiled.compiled_stretch import ReadStretch, StretchCompiler, run_eagerly
from planner.compiled.planned_code import PlannedCompiler, Room
from planner.compiled.planned_values import PlannedValues
from planner.compiled.stretches import BY_NUMBERS, DRAWS, NO_GAIN, NO_ROOM, Stretch
from planner.measuring.measure import measure
from planner.running import backward_segments
from planner.running.planned_forward import PlannedForward
from solvers.replay import replay
from tests.planner.blocks.small_blocks import batch, small, small_plan
from tests.planner.small import Net, make, plan_for, sample, square

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
    reason="Inductor needs a C++ compiler",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Tanhs(nn.Module):
    """Blocks of products, dropout and functions whose calls can be counted; a loss inside."""

    def __init__(self, num_blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(num_blocks))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(num_blocks))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + self.dropout(down(torch.tanh(up(x)) * 0.5 + 1))
        return F.silu(x).square().mean()


class EagerStretches(StretchCompiler):
    """Runs stretches call by call; all but the C++ compiler's part of a compiled step."""

    def __init__(self, extra_bytes: int = 0) -> None:
        super().__init__()
        self._extra_bytes = extra_bytes
        self.offered: list[Stretch] = []
        self._functions: dict[int, Any] = {}

    def read(self, values: PlannedValues, stretch: Stretch) -> ReadStretch | str:
        """Claims what it was told to."""
        self.offered.append(stretch)
        key = len(self.offered)
        run = run_eagerly(values, stretch)
        layouts = [(tuple(n.meta["val"].shape), n.meta["val"].stride()) for n in stretch.takes]

        def checked(boxed: list[Any]) -> Any:
            assert [(tuple(t.shape), t.stride()) for t in boxed] == layouts
            return run(boxed)

        self._functions[key] = checked
        lowered: Any = None
        return ReadStretch(key=key, code=lowered, extra_bytes=self._extra_bytes, lowered=lowered)

    def compiled(self, read: ReadStretch) -> Any:
        """The calls themselves."""
        return self._functions[read.key]


@cache
def tanhs_plan() -> Plan:
    """A plan of the model of most tests, which others of its kind can apply, too."""
    return plan_for(make(Tanhs), sample(), share=0.4)


def eagerly(monkeypatch: pytest.MonkeyPatch, extra_bytes: int = 0) -> EagerStretches:
    """From now on ``compile=True`` divides steps and compiles nothing."""
    made = EagerStretches(extra_bytes)
    monkeypatch.setattr(planned_code, "StretchCompiler", lambda: made)
    return made


def step(model: nn.Module, *given: Tensor) -> dict[str, Tensor]:
    """One seeded step: loss, gradients, buffers and the generator's state."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(*given)
    loss = output if output.dim() == 0 else square(output)
    loss.backward()
    found = {"loss": loss.detach(), "generator": torch.get_rng_state()}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to the rounding of other kernels; the generator's state to the bit."""
    assert torch.equal(found["generator"], expected["generator"])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6, msg=name)


def test_divided_steps_have_eagers_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches that run their calls one by one change nothing, batch norm and dropout included."""
    eagerly(monkeypatch)
    model, x = make(Net), sample()
    expected = step(copy.deepcopy(model), x)
    plan = plan_for(model, x, share=0.5)
    plan.apply(model, compile=True)
    assert_equal(step(model, x), expected)
    applied = applied_plan(model)
    assert applied is not None
    assert applied.compiled is not None
    assert applied.compiled.stretches > 2


def test_parts_of_backward_are_divided_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of many bytes leave in groups; a stretch ends where a group leaves."""
    eagerly(monkeypatch)
    monkeypatch.setattr(backward_segments, "least_group_bytes", lambda _bytes: 2**14)
    model, x = make(Tanhs), sample()
    expected = step(copy.deepcopy(model), x)
    tanhs_plan().apply(model, compile=True)
    assert_equal(step(model, x), expected)
    planned = stand_in_of(model)
    assert isinstance(planned, PlannedForward)
    (prepared,) = (prepared for call in planned.calls for prepared in call.prepared)
    assert len(prepared.step._backward.segments) > 1


class ChannelsLast(nn.Module):
    """Its output has another layout than a loop's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x.contiguous(memory_format=torch.channels_last))
        return torch.tanh(torch.tanh(torch.tanh(hidden) * 2) * 2)


def test_gradients_of_a_loop_may_have_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code has fixed strides; for others backward runs call by call, and says so."""
    eagerly(monkeypatch)
    model, x = make(ChannelsLast), torch.randn(2, 4, 8, 8)
    grad = torch.randn(2, 4, 8, 8)
    expected = torch.autograd.grad(model(x), list(model.parameters()), grad)
    optimize(model, x, budget_gb=1).apply(model, compile=True)
    output = model(x)
    assert not output.is_contiguous()
    assert grad.is_contiguous()
    with pytest.warns(PlanWarning, match="comes in another layout than the output's"):
        found = torch.autograd.grad(output, list(model.parameters()), grad)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_draws_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stretch has a call that draws; each draw of the schedule is counted."""
    made = eagerly(monkeypatch)
    model, x = make(Tanhs), sample()
    tanhs_plan().apply(model, compile=True)
    step(model, x)
    assert made.offered
    for stretch in made.offered:
        for call in stretch.calls:
            assert torch.Tag.nondeterministic_seeded not in call.meta["operator"].tags
    applied = applied_plan(model)
    assert applied is not None
    assert applied.compiled is not None
    assert applied.compiled.eager[DRAWS] == 3  # one for each dropout, whose masks are saved


class Looks(nn.Module):
    """Looks rows up in a table, and cross entropy looks labels up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 32), nn.Linear(32, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.out(torch.tanh(self.table(tokens) * 2) + 1), tokens)


def test_indexing_by_numbers_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of range, it is an error in eager; in compiled code it ends a process with threads."""
    made = eagerly(monkeypatch)
    model, tokens = make(Looks), torch.arange(60) % 20
    optimize(model, tokens, budget_gb=1).apply(model, compile=True)
    step(model, tokens)
    called = [str(call.meta["operator"]) for s in made.offered for call in s.calls]
    assert called
    assert not [name for name in called if "embedding" in name or "nll_loss" in name]
    applied = applied_plan(model)
    assert applied is not None
    assert applied.compiled is not None
    assert applied.compiled.eager[BY_NUMBERS] == 4  # both, each way
    with pytest.raises(IndexError):
        model(tokens + 1)


def test_stretches_without_room_are_halved_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no code fits, every call stays eager, and a warning says so."""
    made = eagerly(monkeypatch, extra_bytes=10**9)
    model, x = make(Tanhs), sample()
    plan = tanhs_plan()
    expected = step(copy.deepcopy(model), x)
    plan.apply(model, compile=True)
    with pytest.warns(PlanWarning, match="most calls of a planned Tanhs stay eager"):
        found = step(model, x)
    assert_equal(found, expected)
    applied = applied_plan(model)
    assert applied is not None
    assert applied.compiled is not None
    assert applied.compiled.stretches == applied.compiled.compiled == 0
    assert applied.compiled.eager[NO_ROOM] > 0
    longest = max(made.offered, key=lambda stretch: len(stretch.calls))
    halves = [s for s in made.offered if set(s.calls) < set(longest.calls)]
    assert set(longest.calls) >= {call for half in halves for call in half.calls}
    assert len(halves) >= 2


def test_memory_of_others_is_not_freed_in_a_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and inputs stay, however late a stretch reads them; saved tensors do not."""
    made = eagerly(monkeypatch)
    model, x = make(Tanhs), sample()
    tanhs_plan().apply(model, compile=True)
    step(model, x)
    taken = [(root, root in s.last_read) for s in made.offered for root in s.takes]
    others = [freed for root, freed in taken if root.name.startswith(("parameter", "input"))]
    assert others
    assert not any(others)
    assert any(freed for root, freed in taken if root.name.startswith("saved"))


def test_products_alone_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch neither begins nor ends with a product of matrices, which fuses with nothing."""
    made = eagerly(monkeypatch)
    model, x = make(Tanhs), sample()
    tanhs_plan().apply(model, compile=True)
    step(model, x)
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    for stretch in made.offered:
        assert stretch.calls[0].meta["operator"] not in products
        assert stretch.calls[-1].meta["operator"] not in products
    applied = applied_plan(model)
    assert applied is not None
    assert applied.compiled is not None
    assert applied.compiled.eager[NO_GAIN] > 0


def test_plans_in_blocks_have_eagers_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's step is divided, under the budget of the whole step."""
    eagerly(monkeypatch)
    plan, model = small_plan(), small()
    expected = step(copy.deepcopy(model), *batch())
    plan.apply(model, compile=True)
    assert_equal(step(model, *batch()), expected)
    applied = applied_blocks(model)
    assert applied is not None
    assert all(block.compiled is not None for block in applied.blocks.values())
    assert applied.compiled is not None
    assert str(applied).startswith(f"1 of 1 steps by the plans of {len(applied.blocks)} blocks; ")
    assert str(applied).endswith(str(applied.compiled))


def test_a_blocks_room_is_that_of_the_whole_step() -> None:
    """Before its runs, a block finds what the step holds then, not what it holds alone."""
    plan = small_plan()
    outcome = replay(plan.graph, plan.schedule)
    for path in plan.blocks:
        block = plan.parts.of(path)
        room = Room.of_block(plan, block, path)
        names = [block.graph.operators[v].name for v in block.schedule.order]
        for moment, v in enumerate(block.schedule.order):
            if block.graph.operators[v].phase == "loss":
                continue
            assert room.run_of is not None
            run = room.run_of[moment]
            name = plan.graph.operators[plan.schedule.order[run]].name
            assert name == f"{path}/{names[moment]}"
            assert room.before(moment) <= room.during(moment) == outcome.memory_bytes[run]


def test_copies_of_a_compiled_model_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied or pickled, a planned model keeps that it is compiled."""
    eagerly(monkeypatch)
    model, x = make(Tanhs), sample()
    tanhs_plan().apply(model, compile=True)
    expected = step(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(step(twin, x), expected)
        applied = applied_plan(twin)
        assert applied is not None
        assert applied.compiled is not None
        assert applied.compiled.compiled > 0


class Ran(NamedTuple):
    """A compiled planned step, the eager one, and what was read of its code."""

    plan: Plan
    model: nn.Module
    x: Tensor
    found: dict[str, Tensor]
    expected: dict[str, Tensor]
    compiler: PlannedCompiler


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Compiled once, by a plan from a file: the C++ compiler takes its time."""
    model, x = make(Tanhs), sample()
    expected = step(copy.deepcopy(model), x)
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    tanhs_plan().save(path)
    plan = Plan.load(path)
    compiler = PlannedCompiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner.plan, "compiler_for", lambda _plan: compiler)
        plan.apply(model, compile=True)
        found = step(model, x)
    return Ran(plan, model, x, found, expected, compiler)


@needs_compiler
@pytest.mark.slow
def test_numbers_are_eagers_up_to_rounding(ran: Ran) -> None:
    """Loss and gradients; the generator ends where eager's does, and masks are the same."""
    assert_close(ran.found, ran.expected)


@needs_compiler
@pytest.mark.slow
def test_measured_peak_is_within_the_budget(ran: Ran) -> None:
    """By the allocator's record of a real step."""
    assert measure(ran.model, ran.x, repeats=0).peak_bytes <= ran.plan.budget_bytes


@needs_compiler
@pytest.mark.slow
def test_repetitions_survive_in_the_compiled_code(ran: Ran) -> None:
    """Each run of ``tanh`` by the schedule is a call in the code, repetitions included."""
    operators = ran.plan.graph.operators
    runs = [v for v in ran.plan.schedule.order if "tanh" in operators[v].target]
    first = {v for v in runs if operators[v].phase == "forward"}
    wanted = sum(v in first for v in runs)
    assert wanted > len(first) == 3
    graphs = [read.lowered for read in ran.compiler.taken]
    calls = [n for graph in graphs for n in graph.nodes if n.target is torch.ops.aten.tanh.default]
    assert len(calls) == wanted
    codes = "".join(read.code.text for read in ran.compiler.taken)
    assert codes.count(".tanh()") == wanted


@needs_compiler
@pytest.mark.slow
def test_plans_in_blocks_are_compiled_within_the_steps_budget() -> None:
    """Numbers up to rounding, and the measured peak of the whole step within its budget."""
    plan, model = small_plan(), small()
    expected = step(copy.deepcopy(model), *batch())
    plan.apply(model, compile=True)
    assert_close(step(model, *batch()), expected)
    applied = applied_blocks(model)
    assert applied is not None
    assert all(block.compiled and block.compiled.stretches for block in applied.blocks.values())
    assert measure(model, batch(), repeats=0).peak_bytes <= plan.budget_bytes


def test_other_devices_are_refused() -> None:
    """A plan for a card names the backend that plans compiled steps there."""
    model, x = make(Tanhs), sample()
    plan = optimize(model, x, budget_gb=1, device="h100")
    with pytest.raises(PlanError, match=r'plan for the CPU.*backend="remat"'):
        planner.plan.compiler_for(plan)
