"""Steps that Inductor compiles within a budget: bits, bytes, and what lies on the way."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from graph_capture.private_torch.compiler import inductor_config
from graph_capture.private_torch.inductor import generate_code
from planner import InfeasibleBudgetError, PlanWarning
from planner.compiled import CompiledPlan, choose, install
from planner.compiled import lowered_peak as lowered
from planner.measuring.measure import measure
from solvers.replay import replay
from tests.planner.compiled.models import WithLoss, assert_same, compiled, model_and_sample, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
        reason="Inductor needs a C++ compiler",
    ),
]


class Ran(NamedTuple):
    """A step within a budget, and the one without."""

    found: dict[str, Tensor]
    plan: CompiledPlan
    measured_bytes: int
    unbudgeted: dict[str, Tensor]
    unbudgeted_bytes: int
    codes: list[str]
    chosen: list[str]
    num_generated: int
    num_programs: int


@pytest.fixture(scope="module")
def ran() -> Iterator[Ran]:
    """Compiled once for all tests of this file: the C++ compiler takes its time."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    programs: list[str] = []
    readings: list[tuple[int, list[str]]] = []
    generated: list[Any] = []
    codegen = GraphLowering.codegen

    def counted(lowering: Any) -> Any:
        generated.append(lowering)
        return codegen(lowering)

    load = CppPythonBindingsCodeCache.load_async.__func__  # type: ignore[attr-defined]

    def loaded(cls: Any, program: str, *args: Any, **options: Any) -> Any:
        programs.append(program)
        return load(cls, program, *args, **options)

    def kept(module: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        code = generate_code(module, inputs, **options)
        codes.append(code.text)
        return code

    def reading(*graphs: Any, **how: Any) -> int:
        extra_bytes = lowered.lowered_extra_bytes(*graphs, **how)
        readings.append((extra_bytes, codes[-2:]))
        return extra_bytes

    model, x = model_and_sample()
    torch.compiler.reset()
    plain = torch.compile(model)
    expected = step(model, plain, x)
    unbudgeted_bytes = measure(plain, x, repeats=0).peak_bytes
    settings = {"fx_graph_cache": False, "compile_threads": 1}
    with pytest.MonkeyPatch.context() as patch, inductor_config().patch(settings):
        patch.setattr(GraphLowering, "codegen", counted)
        patch.setattr(CppPythonBindingsCodeCache, "load_async", classmethod(loaded))
        patch.setattr(lowered, "generate_code", kept)
        patch.setattr(choose, "lowered_extra_bytes", reading)
        budget_bytes = int(0.8 * unbudgeted_bytes)
        call, plans = compiled(model, lower="inductor", budget_bytes=budget_bytes)
        found = step(model, call, x)
    measured = measure(call, x, repeats=0).peak_bytes
    extra_bytes = plans[0].predicted_peak_bytes - plans[0].graph.resident_bytes
    chosen = next(code for num_bytes, code in readings if num_bytes == extra_bytes)
    yield Ran(
        found,
        plans[0],
        measured,
        expected,
        unbudgeted_bytes,
        codes,
        chosen,
        num_generated=len(generated),
        num_programs=len(programs),
    )
    torch.compiler.reset()


@pytest.mark.slow
def test_bits_are_those_of_the_unbudgeted_step(ran: Ran) -> None:
    """Loss, gradients and the generator equal those of ``torch.compile``, dropout included."""
    assert ran.plan.num_recomputed > 0
    assert_same(ran.found, ran.unbudgeted)


@pytest.mark.slow
def test_measured_peak_is_that_of_the_generated_code(ran: Ran) -> None:
    """To the byte, and within the budget."""
    assert ran.measured_bytes == ran.plan.predicted_peak_bytes <= ran.plan.budget_bytes


@pytest.mark.slow
def test_code_that_was_read_is_compiled_as_it_is(ran: Ran) -> None:
    """Compiling the chosen graphs generates nothing anew."""
    assert ran.num_generated == len(ran.codes) >= 2


@pytest.mark.slow
def test_kernels_are_compiled_together(ran: Ran) -> None:
    """Forward's are one C++ program, and backward's another."""
    assert all(code.count("async_compile.cpp_pybinding(") > 1 for code in ran.chosen)
    assert ran.num_programs == 2


@pytest.mark.slow
def test_recomputation_survives_lowering(ran: Ran) -> None:
    """The chosen code multiplies as often as the schedule says: nothing was merged."""
    forward, backward = ran.chosen
    called = sum(len(re.findall(r"extern_kernels\.(?:add)?mm\(", c)) for c in (forward, backward))
    targets = [ran.plan.graph.operators[v].target for v in ran.plan.schedule.order]
    assert called == sum(t in ("aten.mm.default", "aten.addmm.default") for t in targets)


@pytest.mark.slow
def test_a_budget_above_all_leaves_pytorchs_own_partition(ran: Ran) -> None:
    """Its code is read, nothing is solved, and the words say so."""
    model, x = model_and_sample()
    call, plans = compiled(model, lower="inductor", budget_gb=1)
    step(model, call, x)
    assert plans[0].overhead == 0
    assert plans[0].unplanned_peak_bytes == ran.unbudgeted_bytes
    assert "PyTorch's own partition fits" in str(plans[0])


@pytest.mark.slow
def test_infeasible_budget_names_what_was_found() -> None:
    """The error is raised before any kernel is compiled."""
    model, x = model_and_sample()
    call, _ = compiled(model, lower="inductor", budget_bytes=1000)
    with pytest.raises(Exception, match="once Inductor has compiled it") as caught:
        step(model, call, x)
    error = caught.value.inner_exception  # type: ignore[attr-defined]
    assert isinstance(error, InfeasibleBudgetError)
    assert error.min_budget_bytes > 1000


@pytest.mark.slow
def test_install_plans_what_inductor_compiles(ran: Ran) -> None:
    """``torch.compile(model)`` within the block gets the same plan, and none after it."""
    model, x = model_and_sample()
    torch.compiler.reset()
    with install(budget_bytes=ran.plan.budget_bytes) as plans:
        found = step(model, torch.compile(model), x)
    assert_same(found, ran.unbudgeted)
    assert [p.predicted_peak_bytes for p in plans] == [ran.plan.predicted_peak_bytes]
    torch.compiler.reset()
    step(model, torch.compile(model), x)
    assert len(plans) == 1


@pytest.mark.slow
def test_a_device_whose_code_is_not_read_gets_a_plan_by_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A warning says so, the plan, too; its peak is the cost graph's, within the budget."""
    monkeypatch.setattr(choose, "can_be_read", lambda device: False)
    model, x = model_and_sample()
    told: list[CompiledPlan] = []

    class Made(Exception):
        """The plan is there; compiling is not wanted."""

    def on_plan(plan: CompiledPlan) -> None:
        told.append(plan)
        raise Made

    call, _ = compiled(model, lower="inductor", budget_bytes=500_000, on_plan=on_plan)
    with (
        pytest.warns(PlanWarning, match="read back on the CPU only"),
        pytest.raises(Exception, match="Made"),
    ):
        step(model, call, x)
    assert told[0].predicted_peak_bytes == replay(told[0].graph, told[0].schedule).peak_bytes
    assert "predicted by rule" in str(told[0])


@pytest.mark.slow
def test_least_budget_that_an_error_names_works() -> None:
    """It is far below what Inductor's own fusion takes, and the step measures no more."""
    torch.manual_seed(0)
    model, x = WithLoss(num_blocks=6), torch.randn(128, 32)
    call, _ = compiled(model, lower="inductor", budget_bytes=1000)
    with pytest.raises(Exception, match="once Inductor has compiled it") as caught:
        step(model, call, x)
    least_bytes = caught.value.inner_exception.min_budget_bytes  # type: ignore[attr-defined]
    call, plans = compiled(model, lower="inductor", budget_bytes=least_bytes)
    found = step(model, call, x)
    measured_bytes = measure(call, x, repeats=0).peak_bytes
    assert measured_bytes == plans[0].predicted_peak_bytes <= least_bytes
    torch.compiler.reset()
    plain = torch.compile(model)
    for name, value in step(model, plain, x).items():
        torch.testing.assert_close(found[name], value)
    assert measured_bytes < 0.6 * measure(plain, x, repeats=0).peak_bytes


@pytest.mark.slow
def test_a_marked_dimension_is_planned_for_its_largest_size() -> None:
    """One plan for all sizes up to it: no call takes more, and gradients are right."""
    model, x = model_and_sample()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0  # eager draws other masks than Inductor
    call, plans = compiled(model, lower="inductor", budget_bytes=450_000)
    for rows in (96, 128, 64):
        part = x[:rows].clone()
        torch._dynamo.mark_dynamic(part, 0, min=2, max=128)
        found = step(model, call, part)
        assert measure(call, part, repeats=0).peak_bytes <= plans[0].predicted_peak_bytes
        for name, value in step(model, model, part).items():
            torch.testing.assert_close(found[name], value)
    assert len(plans) == 1
    assert plans[0].num_recomputed > 0
    assert plans[0].predicted_peak_bytes <= 450_000


def test_a_backward_that_passes_gradients_on() -> None:
    """It has no calls, and Inductor generates no code for it."""
    weight = torch.randn(32, 64, requires_grad=True)
    plans: list[CompiledPlan] = []
    options = {"budget_gb": 1, "on_plan": plans.append}
    torch.compiler.reset()
    call = torch.compile(lambda x, w: x + w, backend="remat", options=options)
    with pytest.warns(PlanWarning, match="only a part of the training step"):
        result = call(torch.randn(32, 64), weight)
    (2 * result).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((32, 64), 2.0))
    assert plans[0].predicted_peak_bytes == 4 * weight.nbytes


def test_install_is_for_inductor() -> None:
    """Other kernels are the backend's."""
    with (
        pytest.raises(ValueError, match=r"install\(\) is for Inductor, got lower='aot_eager'"),
        install(budget_gb=1, lower="aot_eager"),
    ):
        pass
