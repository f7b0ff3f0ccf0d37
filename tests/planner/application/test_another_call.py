"""A planned module that is called in another way than it was planned for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.testing.bitwise import (
    assert_same_tensors,
)
from planner import (
    CallMismatchError,
    Plan,
    PlanError,
    PlanWarning,
)
from planner.planning.make_plan import replan
from tests.planner.small import make, plan_for, sample, square

from .common import assert_same_after, gradients


def test_another_shape_is_an_error_that_names_both(plan):
    """The message has the planned and the given shape and says what to do."""
    model = plan.apply(make())
    with pytest.raises(CallMismatchError) as caught:
        model(sample(rows=17))
    for part in ("float32[17, 32]", "float32[256, 32]", "input.x", "'replan'"):
        assert part in str(caught.value)


def test_unplanned_runs_the_own_forward(plan):
    """Another shape trains without a plan, with the bits of the plain model."""

    def run(model):
        square(model(sample(1))).backward()
        square(model(sample(2, rows=17))).backward()

    plain, planned = make(), plan.apply(make(), on_shape_change="unplanned")
    torch.manual_seed(1)
    run(plain)
    torch.manual_seed(1)
    with pytest.warns(PlanWarning, match=r"not run by its plan.*float32\[17, 32\]"):
        run(planned)
    assert_same_tensors(gradients(plain), gradients(planned))


def test_replan_makes_one_plan_for_each_shape(plan, monkeypatch):
    """A second shape is planned once and used again, bitwise right."""
    made = []
    monkeypatch.setattr("planner.plan.replan", lambda *a, f=replan: made.append(f(*a)) or made[-1])
    plain, planned = make(), plan.apply(make(), on_shape_change="replan")
    for rows in (ROWS_TWO, 256, ROWS_TWO, 256):
        for model in (plain, planned):
            torch.manual_seed(1)
            model.zero_grad()
            square(model(sample(2, rows=rows))).backward()
        assert_same_tensors(gradients(plain), gradients(planned))
    assert len(made) == 1
    other, _ = made[0]
    assert other.guard.arguments["x"].shape == (ROWS_TWO, 32)
    assert other.predicted_peak_bytes <= plan.budget_bytes


ROWS_TWO = 200


def test_replan_from_a_file_without_its_loss(plan, tmp_path):
    """loss_fn is not in the file, so another shape cannot be planned: the error says so."""
    plan.save(tmp_path / "plan.json")
    model = Plan.load(tmp_path / "plan.json").apply(make(), on_shape_change="replan")
    with pytest.raises(PlanError, match="loss_fn is not in the file"):
        model(sample(rows=17))


def test_another_plain_argument(plan):
    """A plain argument was traced into the plan, so another value is another call."""
    model = plan.apply(make())
    with pytest.raises(CallMismatchError, match=r"input\.scale"):
        model(sample(), scale=2.0)


def test_another_dtype_of_the_input(plan):
    """The message names both dtypes."""
    with pytest.raises(CallMismatchError, match=r"float64\[256, 32\].*planned was float32"):
        plan.apply(make())(sample().double())


def test_other_strides(plan):
    """A transposed input is another call: its strides decide what kernels run."""
    with pytest.raises(CallMismatchError, match="strides"):
        plan.apply(make())(sample(rows=32, width=256).t())


def test_an_input_that_wants_a_gradient(plan):
    """The plan has no gradient for the input, so it must not swallow one."""
    with pytest.raises(CallMismatchError, match="requires_grad"):
        plan.apply(make())(sample().requires_grad_())


def test_a_wrong_call_is_the_models_own_error(plan):
    """An unknown argument is the TypeError that the model would raise."""
    with pytest.raises(TypeError, match="nonsense"):
        plan.apply(make())(sample(), nonsense=1)


@pytest.mark.parametrize("call", [lambda m: m(sample(1)), lambda m: m(x=sample(1))])
def test_keyword_and_position_are_one_call(plan, call):
    """How an argument is passed makes no difference."""
    assert_same_after(lambda m: square(call(m)).backward(), plan)


def test_a_default_that_is_passed_is_the_same_call(plan):
    """Passing what is the default anyway is the planned call."""
    assert_same_after(lambda m: square(m(sample(1), scale=1.0)).backward(), plan)


def test_a_default_that_was_passed_when_planned(plan):
    """Leaving out what is the default anyway is the planned call."""
    explicit = plan_for(make(), (sample(), 1.0), loss_fn=square)
    assert_same_after(lambda m: square(m(sample(1))).backward(), explicit)
