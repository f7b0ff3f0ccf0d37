"""What a planned step says when there is no more memory."""

from __future__ import annotations

import subprocess
import sys
import traceback
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graph_capture.units import format_bytes
from planner import Plan, optimize
from planner.base.training_step import train_step
from planner.running.out_of_memory import (
    HEADER,
    DeviceMemory,
    account,
    is_out_of_memory,
    memory_before,
)
from tests.planner.small import make, plan_for, sample, square

GB = 10**9


class FailAt(TorchDispatchMode):
    """Raises an error in place of the n-th call of an operator."""

    def __init__(self, target: str, n: int, error: BaseException) -> None:
        super().__init__()
        self.target, self.left, self.error = target, n, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if str(func) == self.target:
            if self.left == 0:
                raise self.error
            self.left -= 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that recomputes."""
    return plan_for(make(), sample(), loss_fn=torch.sum, share=0.5)


def moment_in(plan: Plan, where: str) -> int:
    """A run of one call in the forward graph, a recomputation, or a first run in backward."""
    order, graph = plan.schedule.order, plan.graph
    loss = next(v for v, op in enumerate(graph.operators) if op.phase == "loss")
    for moment, v in enumerate(order):
        operator, first = graph.operators[v], v not in order[:moment]
        if not operator.target.startswith("aten.") or "+" in operator.target:
            continue
        in_forward = moment < order.index(loss)
        found = "forward" if in_forward else "backward" if first else "recomputation"
        if found == where and moment > 5:
            return moment
    raise AssertionError(f"the plan has no {where}")


def provoked(plan: Plan, moment: int, error: BaseException, model=None) -> BaseException:
    """What comes out of a planned step in which a run fails with ``error``."""
    target = plan.graph.operators[plan.schedule.order[moment]].target
    before = [plan.graph.operators[v].target for v in plan.schedule.order[:moment]]
    n = sum(part == target for text in before for part in text.split("+"))
    model = plan.apply(model or make())
    with pytest.raises(type(error)) as caught, FailAt(target, n, error):
        train_step(model, sample(), torch.sum)
    return caught.value


@pytest.mark.parametrize("where", ["forward", "recomputation", "backward"])
def test_the_note_names_the_run(plan, where):
    """The operator, its module, its pass and its place in the schedule, wherever it fails."""
    moment = moment_in(plan, where)
    original = torch.OutOfMemoryError("no memory today")
    error = provoked(plan, moment, original)
    assert error is original
    (note,) = error.__notes__
    operator = plan.graph.operators[plan.schedule.order[moment]]
    in_words = "forward pass" if where == "forward" else "backward pass"
    in_words += ", recomputed" if where == "recomputation" else ""
    run = f"run {moment + 1} of {len(plan.schedule.order)}"
    place = operator.module_path or operator.source
    expected = f"failed    {operator.target} ({operator.name} of {place}) in the {in_words}, {run}"
    assert expected in note


@pytest.mark.slow
def test_every_run_is_found(plan):
    """For each run of the backward graph of one call, the note has that run's number."""
    loss = next(v for v, op in enumerate(plan.graph.operators) if op.phase == "loss")
    start = plan.schedule.order.index(loss) + 1
    for moment in range(start, len(plan.schedule.order)):
        target = plan.graph.operators[plan.schedule.order[moment]].target
        if target.startswith("aten.") and "+" not in target:
            error = provoked(plan, moment, torch.OutOfMemoryError("no memory today"))
            assert f"run {moment + 1} of" in error.__notes__[0], target


def test_python_prints_the_note_below_the_message(plan):
    """A traceback has the original message, then the note."""
    error = provoked(plan, moment_in(plan, "backward"), torch.OutOfMemoryError("no memory today"))
    text = "".join(traceback.format_exception(error))
    assert str(error) == "no memory today"
    assert text.index("no memory today\n") < text.index(HEADER)


def test_the_note_has_the_predictions(plan):
    """Budget, peak, memory before and at the run, what is live by category and the largest."""
    moment = moment_in(plan, "backward")
    note = provoked(plan, moment, torch.OutOfMemoryError("x")).__notes__[0]
    operator = plan.graph.operators[plan.schedule.order[moment]]
    outputs = sum(plan.graph.storages[k].size_bytes for k in operator.outputs)
    at = plan.replay.memory_bytes[moment]
    before = at - outputs - operator.workspace_bytes
    parameters = sum(
        s.size_bytes for s in plan.graph.storages if s.category == "parameter" and not s.producer
    )
    for part in (
        f"budget {format_bytes(plan.budget_bytes)}",
        f"peak {format_bytes(plan.predicted_peak_bytes)} predicted",
        f"{format_bytes(before)} before it, {format_bytes(at)} while it runs",
        f"parameter {format_bytes(parameters)}",
        "largest   ",
        "to do ",
        "process   resident",
        "if an optimizer keeps state here",
    ):
        assert part in note, part


def test_what_is_live_adds_up(plan):
    """The storages that the note counts are the predicted memory before the run."""
    from planner.running.out_of_memory import _live

    for moment in range(len(plan.schedule.order)):
        live = sum(plan.graph.storages[k].size_bytes for k in _live(plan, moment))
        assert live == memory_before(plan, moment)


@pytest.mark.parametrize(
    ("error", "about_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_which_errors_are_about_memory(error, about_memory):
    """The allocators' own errors and what libraries say; nothing else."""
    assert is_out_of_memory(error) is about_memory


def test_other_errors_go_on_as_they_are(plan):
    """A planned step adds nothing to an error that is not about memory."""
    error = provoked(plan, moment_in(plan, "forward"), RuntimeError("shapes do not fit"))
    assert not hasattr(error, "__notes__")


def test_a_plain_error_of_the_cpu_allocator_gets_the_note(plan):
    """It is a RuntimeError and stays one."""
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes."
    error = provoked(plan, moment_in(plan, "backward"), RuntimeError(text))
    assert type(error) is RuntimeError
    assert error.__notes__[0].startswith(HEADER)


@pytest.mark.filterwarnings("ignore:.*of gradients are there:planner.PlanWarning")
def test_gradients_from_before_the_step_are_named(plan):
    """Gradients that were there already are counted and the advice says what to do."""
    model = make()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    error = provoked(plan, moment_in(plan, "backward"), torch.OutOfMemoryError("x"), model)
    held = format_bytes(sum(p.nbytes for p in model.parameters()))
    assert f"gradients {held} existed before the step" in error.__notes__[0]
    assert "zero_grad(set_to_none=True)" in error.__notes__[0]


def test_a_step_after_the_error_runs(plan):
    """The plan stays applied and the next step works."""
    model = make()
    provoked(plan, moment_in(plan, "backward"), torch.OutOfMemoryError("x"), model)
    train_step(model, sample(), torch.sum)
    assert all(p.grad is not None for p in model.parameters())


def test_an_explanation_that_fails_does_not_hide_the_error(plan, monkeypatch):
    """The original error comes out, with a note that no more can be said."""

    def fail(*args: Any, **kwargs: Any) -> str:
        raise MemoryError("not even for a note")

    monkeypatch.setattr("planner.running.out_of_memory.account", fail)
    original = torch.OutOfMemoryError("no memory today")
    error = provoked(plan, moment_in(plan, "forward"), original)
    assert error is original
    assert "No more can be said: MemoryError: not even for a note" in error.__notes__[0]


def test_the_plan_of_another_shape_is_told_by_its_own_plan(plan):
    """A step that was planned anew for another shape gets the note of that plan."""
    model = plan.apply(make(), on_shape_change="replan")
    train_step(model, sample(rows=128), torch.sum)
    error = torch.OutOfMemoryError("x")
    with (
        pytest.raises(torch.OutOfMemoryError),
        FailAt("aten.gelu.default", 1, error),
    ):
        train_step(model, sample(rows=128), torch.sum)
    (note,) = error.__notes__
    assert "aten.gelu.default" in note
    assert format_bytes(plan.predicted_peak_bytes) not in note


# -- CUDA, by made-up figures -------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_plan(plan) -> Plan:
    """The plan as if it were for a card."""
    return replace(plan, device_type="cuda", _live=None)


def test_what_is_not_the_steps_on_a_card(cuda_plan):
    """Other tensors, fragmentation and other processes are told apart by subtraction."""
    moment = moment_in(cuda_plan, "backward")
    memory = DeviceMemory(
        allocated_bytes=memory_before(cuda_plan, moment) + 3 * GB,
        reserved_bytes=memory_before(cuda_plan, moment) + 5 * GB,
        free_bytes=GB,
        total_bytes=memory_before(cuda_plan, moment) + 13 * GB,
        expandable=False,
    )
    text = account(cuda_plan, moment, memory=memory)
    assert "3 GB in other tensors of this process" in text
    assert "2 GB is reserved and not allocated" in text
    assert "7 GB is of other processes and of CUDA itself" in text
    assert "free the other tensors on the device: 3 GB" in text
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in text
    assert "headroom='10%'" in text


def test_how_much_lower_the_budget_must_be(cuda_plan):
    """To what the step had, its own tensors and what was free, and the headroom."""
    moment = moment_in(cuda_plan, "recomputation")
    had = memory_before(cuda_plan, moment)
    assert cuda_plan.predicted_peak_bytes > had + 1000
    plan = replace(cuda_plan, headroom_bytes=500)
    memory = DeviceMemory(
        allocated_bytes=had, reserved_bytes=had, free_bytes=1000, total_bytes=GB, expandable=True
    )
    text = account(plan, moment, memory=memory)
    lower = had + 1000 + 500
    assert f"lower the budget by about {format_bytes(plan.budget_bytes - lower)}" in text
    assert f"to {format_bytes(lower)}: the step had {format_bytes(had + 1000)}" in text
    assert "expandable_segments" not in text
    assert "other tensors on the device" not in text


def test_with_room_for_the_peak_no_lower_budget_is_advised(cuda_plan):
    """Where enough is free the advice is about fragmentation, not about the budget."""
    moment = moment_in(cuda_plan, "backward")
    had = memory_before(cuda_plan, moment)
    memory = DeviceMemory(
        allocated_bytes=had, reserved_bytes=had, free_bytes=GB, total_bytes=2 * GB, expandable=False
    )
    text = account(cuda_plan, moment, memory=memory)
    assert "lower the budget" not in text
    assert "expandable_segments" in text


def test_an_error_outside_every_run_is_told_so(plan):
    """Without a run there are the plan's figures and advice."""
    text = account(plan, None)
    assert "outside the plan's operators" in text
    assert format_bytes(plan.predicted_peak_bytes) in text
    assert "to do " in text


_REAL = """
import resource
from pathlib import Path
import torch
from planner import optimize
from planner.base.training_step import train_step
from tests.planner.small import Net, square

torch.set_num_threads(1)
x = torch.randn(500_000, 32)
model = Net().train()
plan = optimize(model, x, budget_gb=100, loss_fn=square).apply(model).forward.plan

size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = size + plan.predicted_peak_bytes // 2
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    train_step(model, x, square)
except RuntimeError as error:
    print(type(error).__name__, str(error))
    print(*error.__notes__)
else:
    print("it fitted")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux")
def test_a_process_that_really_has_no_more():
    """Under a limit of addresses the CPU allocator's error names a run and what the plan said."""
    done = subprocess.run(
        [sys.executable, "-c", _REAL], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("RuntimeError")
    assert "DefaultCPUAllocator" in done.stdout
    assert HEADER in done.stdout
    assert "failed    aten." in done.stdout
    assert "limit of addresses" in done.stdout


def test_nothing_is_added_when_nothing_fails():
    """A step under the limit gives no notes and the same gradients as ever."""
    plan = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    output, loss = train_step(plan.apply(make()), sample(), square)
    assert loss is not None
    assert output.requires_grad
