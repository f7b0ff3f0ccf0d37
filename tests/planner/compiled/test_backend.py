"""``torch.compile(model, backend="remat")`` with eager kernels: bits, bytes, errors."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from planner import InfeasibleBudgetError, PlanWarning
from planner.compiled import CompiledPlan, backend, install, remat
from planner.compiled.partition import PART_OF_A_STEP
from planner.measuring.measure import measure
from tests.planner.compiled.models import (
    Block,
    WithLoss,
    assert_same,
    compiled,
    model_and_sample,
    step,
)

ROOT = Path(__file__).parents[3]
BUDGETS = (577_000, 480_000, 355_000)


class _Normed(nn.Module):
    """Batch norm between two layers, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Linear(32, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 32)]
        self.layers = nn.Sequential(*parts, nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def _unbudgeted(model: nn.Module, *sample: Tensor) -> dict[str, Tensor]:
    torch.compiler.reset()
    return step(model, torch.compile(model, backend="aot_eager"), *sample)


class Ran(NamedTuple):
    """A step within a budget."""

    found: dict[str, Tensor]
    plan: CompiledPlan
    measured_bytes: int


@pytest.fixture(scope="module")
def ran() -> list[Ran]:
    """Steps of the small model, one for each budget."""
    steps = []
    for budget_bytes in BUDGETS:
        model, x = model_and_sample()
        call, plans = compiled(model, budget_bytes=budget_bytes)
        found = step(model, call, x)
        steps.append(Ran(found, plans[0], measure(call, x, repeats=0).peak_bytes))
    return steps


def test_bits_are_those_of_the_unbudgeted_step(ran: list[Ran]) -> None:
    """Loss, gradients and the generator equal those of aot_eager, dropout included."""
    expected = _unbudgeted(*model_and_sample())
    for one in ran:
        assert_same(one.found, expected)


def test_measured_peak_is_the_predicted_one(ran: list[Ran]) -> None:
    """To the byte, and within the budget."""
    predicted = [one.plan.predicted_peak_bytes for one in ran]
    assert [one.measured_bytes for one in ran] == predicted
    assert all(p <= budget for p, budget in zip(predicted, BUDGETS, strict=True))


def test_a_lower_budget_recomputes_more(ran: list[Ran]) -> None:
    """Estimated time grows as the budget falls."""
    overheads = [one.plan.overhead for one in ran]
    assert overheads[0] == 0
    assert overheads[0] < overheads[1] < overheads[2]


def test_planning_takes_longer_than_solving(ran: list[Ran]) -> None:
    """Both are seconds of the same clock."""
    assert all(one.plan.planning_s > one.plan.solve_s > 0 for one in ran)


def test_a_mask_is_drawn_again(ran: list[Ran]) -> None:
    """At the tightest budget dropout runs twice, which no bit shows."""
    plan = ran[-1].plan
    again = [plan.graph.operators[v].target for v in plan.schedule.recomputed()]
    assert "aten.native_dropout.default" in again


def test_running_statistics_are_written_once() -> None:
    """Batch norm's buffers after a step with recomputation are those without it."""
    torch.manual_seed(0)
    model, x = _Normed(), torch.randn(128, 32)
    before = {name: b.clone() for name, b in model.named_buffers()}
    expected = _unbudgeted(model, x)
    model.load_state_dict(before, strict=False)
    call, plans = compiled(model, budget_bytes=420_000)
    assert_same(step(model, call, x), expected)
    again = [plans[0].graph.operators[v].target for v in plans[0].schedule.recomputed()]
    assert "aten._native_batch_norm_legit_functional.default" in again


def test_infeasible_budget_names_the_least_one() -> None:
    """The error inside of Dynamo's says the least budget, which is proven here."""
    model, x = model_and_sample()
    call, _ = compiled(model, budget_bytes=1000)
    with pytest.raises(Exception, match="least budget known to work") as caught:
        step(model, call, x)
    error = caught.value.inner_exception  # type: ignore[attr-defined]
    assert isinstance(error, InfeasibleBudgetError)
    assert error.min_budget_bytes == 351_816 == error.lower_bound_bytes


def test_what_the_caller_holds_counts() -> None:
    """``resident_bytes`` is a part of the predicted peak."""
    model, x = model_and_sample()
    call, plans = compiled(model, budget_bytes=10**6, resident_bytes="100kB")
    step(model, call, x)
    assert plans[0].predicted_peak_bytes == measure(call, x, repeats=0).peak_bytes + 100_000


def test_a_loss_outside_is_said() -> None:
    """The graph is then a part of the step, and a warning says that the plan is local."""
    layer, x = nn.Linear(32, 32), torch.randn(128, 32)
    call, _ = compiled(layer, budget_bytes=10**6)
    with pytest.warns(PlanWarning, match="only a part of the training step"):
        call(x).square().mean().backward()


class _Broken(WithLoss):
    """With a graph break between its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x).square().mean()


def _broken() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _Broken(), torch.randn(128, 32)


def test_a_graph_break_is_said() -> None:
    """The second graph's plan says what it counts of the first."""
    model, x = _broken()
    call, _ = compiled(model, budget_bytes=10**6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(x).backward()
    said = [str(w.message) for w in caught if issubclass(w.category, PlanWarning)]
    assert said[0] == PART_OF_A_STEP
    assert re.match(r"a graph break cuts .* counts \d+ kB that other graphs hold", said[1])
    assert len(said) == 2


@pytest.mark.filterwarnings(
    "ignore:a compiled graph is only a part",
    "ignore:a graph break cuts",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # Dynamo reads it
)
@pytest.mark.parametrize(("budget_bytes", "later_bytes"), [(600_000, 0), (460_000, 90_000)])
def test_graphs_of_a_step_share_its_budget(budget_bytes: int, later_bytes: int) -> None:
    """The last plan predicts the whole step; bits are those of the unbudgeted one."""
    model, x = _broken()
    expected = _unbudgeted(model, x)
    call, plans = compiled(model, budget_bytes=budget_bytes, later_bytes=later_bytes)
    assert_same(step(model, call, x), expected)
    measured_bytes = measure(call, x, repeats=0).peak_bytes
    assert len(plans) == 2
    assert measured_bytes == plans[1].predicted_peak_bytes <= budget_bytes


@pytest.mark.slow
def test_dynamic_shapes_are_planned_for_the_largest() -> None:
    """One plan holds for smaller calls; a larger one is compiled again, with a plan of its own."""
    model, x = model_and_sample()
    torch.compiler.reset()
    plans: list[CompiledPlan] = []
    options = {"budget_bytes": 450_000, "lower": "aot_eager", "on_plan": plans.append}
    call = torch.compile(model, backend="remat", dynamic=True, options=options)
    peaks = []
    for rows in (96, 64, 128, 100):
        step(model, call, x[:rows].clone())
        peaks.append(measure(call, x[:rows].clone(), repeats=0).peak_bytes)
    assert len(plans) == 2
    assert max(peaks[:2]) == plans[0].predicted_peak_bytes
    assert max(peaks) == plans[1].predicted_peak_bytes <= 450_000
    expected = _unbudgeted(model, x[:100].clone())
    assert_same(step(model, call, x[:100].clone()), expected)


def test_inference_is_compiled_without_a_plan() -> None:
    """Without gradients there is nothing to recompute."""
    model, x = model_and_sample()
    call, plans = compiled(model, budget_bytes=10**6)
    with torch.no_grad():
        assert torch.equal(call.eval()(x), model.eval()(x))
    assert plans == []


def test_entry_point_is_the_backend() -> None:
    """An installed package is found by its entry point, without an import of ours."""
    text = (ROOT / "pyproject.toml").read_text()
    (place,) = tomllib.loads(text)["project"]["entry-points"]["torch_dynamo_backends"].values()
    module, _, name = place.partition(":")
    assert getattr(import_module(module), name).__name__ == "remat"


@pytest.mark.skipif(
    "remat" not in entry_points(group="torch_dynamo_backends").names, reason="not installed"
)
def test_importing_loads_no_compiler() -> None:
    """Who imports the planner, installed, waits neither for Dynamo nor for jsonschema."""
    code = (
        "import planner, planner.compiled, sys\n"
        "print(*[m for m in ('torch._dynamo', 'jsonschema') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == []


def test_backend_of_a_checkout_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is not installed, PyTorch finds no entry point and is told."""
    told: list[object] = []
    monkeypatch.setattr(backend, "entry_points", lambda **_group: EntryPoints())
    monkeypatch.setattr(backend, "register_backend", lambda *given: told.extend(given))
    backend.register()
    assert told == [remat, "remat"]


@pytest.mark.slow
def test_importing_registers_the_backend() -> None:
    """``torch.compile`` knows the name after the import, twice imported or not."""
    code = (
        "import planner.compiled, torch\n"
        "from planner.compiled.backend import register\n"
        "register()\n"
        "from torch._dynamo.backends.registry import lookup_backend\n"
        "assert lookup_backend('remat') is planner.compiled.remat\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_accumulated_gradients_count() -> None:
    """With grads="accumulated" a step that adds to gradients has the predicted peak."""
    model, x = model_and_sample()
    budget_bytes = 500_000
    call, plans = compiled(model, budget_bytes=budget_bytes, grads="accumulated")
    step(model, call, x)
    measured = measure(call, x, repeats=0, grads="accumulated").peak_bytes
    assert measured == plans[0].predicted_peak_bytes <= budget_bytes


def test_gradients_within_the_function_are_not_planned_and_it_is_said() -> None:
    """torch.func.grad leaves one graph without a backward pass to split."""
    model, x = model_and_sample()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model.eval(), given, (x,))
        return found

    torch.compiler.reset()
    options = {"budget_bytes": 1000, "lower": "aot_eager"}
    call = torch.compile(torch.func.grad(loss), backend="remat", options=options)
    with pytest.warns(PlanWarning, match="nothing is planned, and no budget holds"):
        call(parameters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Inductor's own
def test_a_block_without_a_plan_says_so() -> None:
    """What was compiled before install(), or never, has no budget."""
    with pytest.warns(PlanWarning, match="nothing was planned"), install(budget_bytes=1000):
        pass


class _WithLogits(WithLoss):
    """That returns its loss, and what it was computed from."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = x.repeat(1, 4)
        return logits.square().mean(), logits


def _releasing(lower: str, **options: Any) -> tuple[int, int, dict[str, Tensor]]:
    """Predicted and measured peak of a loop that keeps the loss alone, and what it computes."""
    torch.manual_seed(0)
    model, x = _WithLogits(), torch.randn(128, 32)
    call, plans = compiled(model, lower=lower, outputs="released", **options)
    found = step(model, lambda x: call(x)[0], x)
    measured = measure(call, x, loss_fn=lambda made: made[0], outputs="released", repeats=0)
    return plans[0].predicted_peak_bytes, measured.peak_bytes, found


@pytest.mark.parametrize("budget_bytes", [10**6, 450_000])
def test_released_outputs_are_free_in_backward(budget_bytes: int) -> None:
    """The predicted peak is that of a loop that lets go of all but the loss, with equal bits."""
    predicted_bytes, measured_bytes, found = _releasing("aot_eager", budget_bytes=budget_bytes)
    assert predicted_bytes == measured_bytes <= budget_bytes
    torch.manual_seed(0)
    model, x = _WithLogits(), torch.randn(128, 32)
    torch.compiler.reset()
    call = torch.compile(model, backend="aot_eager")
    assert_same(step(model, lambda x: call(x)[0], x), found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Inductor's own
@pytest.mark.parametrize("budget_bytes", [10**6, 480_000])
def test_released_outputs_are_free_in_code_that_is_read(budget_bytes: int) -> None:
    """Inductor's code is read as such a loop calls it."""
    predicted_bytes, measured_bytes, _ = _releasing("inductor", budget_bytes=budget_bytes)
    assert predicted_bytes == measured_bytes <= budget_bytes


@pytest.mark.slow
def test_a_loop_that_releases_needs_less() -> None:
    """The least budget is lower than that of a loop that holds the outputs."""
    least = []
    for outputs in ("held", "released"):
        torch.manual_seed(0)
        model, x = _WithLogits(), torch.randn(128, 32)
        call, _ = compiled(model, budget_bytes=1000, outputs=outputs)
        with pytest.raises(Exception, match="least budget known to work") as caught:
            call(x)
        least.append(caught.value.inner_exception.min_budget_bytes)  # type: ignore[attr-defined]
    assert least[1] < least[0]


class _Classes(nn.Module):
    """Blocks, and a loss with classes as rows of ones and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        wanted = nn.functional.one_hot(classes, 32).float()  # checks that numbers are in range
        return nn.functional.binary_cross_entropy_with_logits(x, wanted)


@pytest.mark.slow
def test_checks_of_a_graph_run_once_and_still_raise() -> None:
    """A check makes nothing: the step with it is planned, and out of range is an error."""
    x, classes = torch.randn(128, 32), torch.arange(128) % 32
    torch.manual_seed(0)
    model = _Classes()
    expected = _unbudgeted(model, x, classes)
    call, plans = compiled(model, budget_bytes=480_000)
    assert_same(step(model, call, x, classes), expected)
    assert plans[0].schedule.recomputed()
    found = measure(call, (x, classes), repeats=0)
    assert found.peak_bytes == plans[0].predicted_peak_bytes
    model.zero_grad()
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        call(x, classes + 1)
