"""A model that is watched: its first training call is recorded or planned."""

from __future__ import annotations

import copy
import functools
import gc
import io
import types
import warnings
import weakref

import pytest
import torch
from torch import nn

from graph_capture.costs.allocator import peak_extra_bytes
from planner import InfeasibleBudgetError, Plan, PlanError, PlanWarning, applied_plan, optimize
from planner import watch as watch_model
from tests.bitwise import assert_same_tensors
from tests.planner.small import Net, make, sample, square


def trained(model: nn.Module, num_steps: int = 3, **options: object) -> dict[str, torch.Tensor]:
    """Losses, gradients and buffers of a loop, and the generator's next number."""
    torch.manual_seed(1)
    losses = []
    for i in range(num_steps):
        model.zero_grad()
        loss = square(model(sample(i), **options))
        loss.backward()
        losses.append(loss.detach())
    gradients = [p.grad for p in model.parameters()]
    found = [*losses, *gradients, *model.buffers(), torch.rand(3)]
    return {str(i): tensor for i, tensor in enumerate(found)}


@pytest.fixture(scope="module")
def budget_bytes() -> int:
    """Three quarters of what keeping everything takes, which fits only by recomputing."""
    keep = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    resident = keep.graph.resident_bytes
    return int(resident + 0.75 * (keep.baseline_peak_bytes - resident))


def test_the_first_call_already_goes_by_the_plan(budget_bytes: int) -> None:
    """Planned in the loop, with eager's bits, and every step counts as planned."""
    model = make()
    watched = watch_model(model, budget_bytes=budget_bytes, loss_fn=square)
    assert watched.plan is None
    assert_same_tensors(trained(make()), trained(model))
    assert watched.plan is not None
    assert watched.plan.schedule.recomputed()
    assert applied_plan(model).planned_steps == 3
    assert str(applied_plan(model)).startswith("3 of 3 steps by the plan, predicted peak ")


def test_the_plan_is_that_of_optimize(budget_bytes: int) -> None:
    """Watching is another way to find the sample, not another planner."""
    model = make()
    watched = watch_model(model, budget_bytes=budget_bytes, loss_fn=square, optimizer="adamw")
    trained(model, 1)
    plan = optimize(make(), sample(), budget_bytes=budget_bytes, loss_fn=square, optimizer="adamw")
    assert watched.plan.schedule == plan.schedule


def test_planning_in_the_loop_stays_within_the_budget(budget_bytes: int) -> None:
    """The call that is planned takes no more memory than the ones after it may."""
    model = make()
    watch_model(model, budget_bytes=budget_bytes, loss_fn=square)
    x = sample()
    there = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x))

    def step() -> torch.Tensor:
        loss = square(model(x))
        loss.backward()
        return loss

    assert there + peak_extra_bytes(step) <= budget_bytes


def test_without_a_budget_the_call_is_recorded() -> None:
    """As ``optimize`` takes it, and the model is left as it was."""
    model = make()
    watched = watch_model(model)
    assert_same_tensors(trained(make(), scale=0.5), trained(model, scale=0.5))
    assert "forward" not in vars(model)
    assert watched.plan is None
    assert list(watched.sample_input) == ["x", "scale"]
    assert torch.equal(watched.sample_input["x"], sample(0))
    assert optimize(model, watched.sample_input, budget_gb=1, loss_fn=square)


def test_autocast_is_recorded_and_planned_under(budget_bytes: int) -> None:
    """The autocast around the loop's call is the plan's."""
    model = make()
    watched = watch_model(model, budget_bytes=budget_bytes, loss_fn=square)
    with torch.autocast("cpu", torch.bfloat16):
        loss = square(model(sample()))
    loss.backward()
    assert watched.autocast is torch.bfloat16
    assert watched.plan.guard.autocast == "bfloat16"


def test_calls_that_do_not_train_are_not_the_first() -> None:
    """Evaluation before training, as trainers do it, records nothing."""
    model = make()
    watched = watch_model(model)
    with torch.no_grad():
        model(sample())
    model.eval()(sample())
    with pytest.raises(PlanError, match="no training call yet"):
        _ = watched.sample_input
    model.train()(sample(2))
    assert torch.equal(watched.sample_input[0], sample(2))


def wrapped(forward):
    @functools.wraps(forward)
    def convert(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs).float()

    return convert


def wrap(model: nn.Module) -> nn.Module:
    """Bind a wrapped forward as a method, as accelerate does."""
    forward = model.forward
    forward = getattr(forward, "__func__", forward)
    model.forward = types.MethodType(wrapped(forward), model)
    return model


def test_a_watched_forward_may_be_wrapped_later(budget_bytes: int) -> None:
    """The wrapper stays outside, the plan is reached through it, and can be taken off."""
    model = make()
    watched = watch_model(model, budget_bytes=budget_bytes, loss_fn=square)
    wrap(model)
    assert_same_tensors(trained(wrap(make())), trained(model))
    assert watched.plan.guard.autocast == "bfloat16"
    assert applied_plan(model).planned_steps == 3
    assert applied_plan(model).unplanned_steps == 0
    Plan.remove(model)
    eager = wrap(make())
    for _ in range(2):
        last = trained(eager)
    assert_same_tensors(last, trained(model))
    assert applied_plan(model) is None


def test_a_wrapped_forward_may_be_watched(budget_bytes: int) -> None:
    """What the wrapper does is in the plan."""
    model = wrap(make())
    watch_model(model, budget_bytes=budget_bytes, loss_fn=square)
    assert_same_tensors(trained(wrap(make())), trained(model))
    assert applied_plan(model).planned_steps == 3


def test_a_forward_that_was_replaced_is_said() -> None:
    """A trainer that was built after watching has put its own forward there."""
    model = make()
    watch_model(model, budget_gb=1)
    model.forward = types.MethodType(Net.forward, model)
    with pytest.warns(PlanWarning, match=r"did not come to its watch\(\).*trainer first, then w"):
        trained(model, 2)


def test_an_own_plan_may_be_applied_to_a_watched_model() -> None:
    """It takes the place of the watch, and one removal restores the model's own forward."""
    model = make()
    watch_model(model, budget_gb=1)
    optimize(model, sample(), budget_gb=1, loss_fn=square).apply(model)
    trained(model)
    assert applied_plan(model).planned_steps == 3
    Plan.remove(model)
    assert "forward" not in vars(model)


def test_a_budget_that_is_too_small_is_an_error_of_each_call() -> None:
    """No step runs above the budget because the first one was refused."""
    model = make()
    watch_model(model, budget_bytes=1000, loss_fn=square)
    for _ in range(2):
        with pytest.raises(InfeasibleBudgetError, match="least budget known"):
            model(sample())


def test_other_shapes_are_planned_for(budget_bytes: int) -> None:
    """By default a call of another shape gets a plan within the same budget."""
    model = make()
    watch_model(model, budget_bytes=budget_bytes, loss_fn=square)
    for rows in (256, 128):
        square(model(sample(rows=rows))).backward()
    assert applied_plan(model).planned_steps == 2
    model = make()
    watch_model(model, budget_bytes=budget_bytes, loss_fn=square, on_shape_change="error")
    square(model(sample())).backward()
    with pytest.raises(PlanError, match="not the planned one"):
        model(sample(rows=128))


def test_copies_and_pickles_are_not_watched(budget_bytes: int) -> None:
    """An average of the weights, or a reference model, keeps its own forward."""
    model = make()
    watched = watch_model(model, budget_bytes=budget_bytes, loss_fn=square)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert_same_tensors(trained(make()), trained(twin))
    assert watched.plan is None
    assert watched.stop() is model
    assert "forward" not in vars(model)


def test_a_call_under_foreign_surroundings_is_not_recorded() -> None:
    """Said once, and the next plain call is the first."""
    model = make()
    watched = watch_model(model)
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.warns(PlanWarning, match="not recorded: it is called under saved_tensors_hooks"),
    ):
        square(model(sample())).backward()
    model(sample(3))
    assert torch.equal(watched.sample_input[0], sample(3))


def test_a_watched_model_that_is_gone_is_gone() -> None:
    """The watched parameter keeps no cycle alive that the collector cannot see."""
    model = make()
    watch_model(model, budget_gb=1)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_positional_and_keyword_arguments_that_no_sample_can_hold() -> None:
    """The error names the argument."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, *xs: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.net(xs[0], scale)

    model = make(Many)
    watch_model(model)
    with pytest.raises(PlanError, match="'xs', which can only be passed by position"):
        model(sample(), scale=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 3}, TypeError, "'batch' is none of them"),
        ({"budget_gb": 1}, PlanError, "is watched already: stop"),
    ],
)
def test_what_watch_refuses(options: dict, error: type[Exception], message: str) -> None:
    """An unknown option, and a model that is watched."""
    model = make()
    watch_model(model, budget_gb=1)
    with pytest.raises(error, match=message):
        watch_model(model, **options)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        watch_model(3)  # type: ignore[arg-type]
