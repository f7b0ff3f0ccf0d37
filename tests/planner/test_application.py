"""What a planned module does in all the ways in which people use a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import (
    assert_same_tensors,
    assert_same_training,
)
from planner import (
    CallMismatchError,
    Plan,
    PlanError,
    PlanMismatchError,
    PlanWarning,
    measure,
    optimize,
)
from planner.planning.make_plan import replan
from planner.running.attach import applied_plan
from planner.running.planned_forward import PlannedForward
from tests.planner.small import Heads, Net, make, plan_for, sample, square


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan for ``Net`` under ``square``."""
    return plan_for(make(), sample(), loss_fn=square)


@pytest.fixture(scope="module")
def heads_plan() -> Plan:
    """A plan for ``Heads``, every output differentiated."""
    return plan_for(make(Heads), sample(), share=0.8)


def gradients(model: nn.Module) -> dict[str, Any]:
    return {f"gradient of {name}": p.grad for name, p in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Any]:
    return {**gradients(model), **model.state_dict(), "generator": torch.get_rng_state()}


def assert_same_after(
    run: Callable[[nn.Module], object], plan: Plan, kind: Callable[[], nn.Module] = Net
) -> None:
    """Run the same training code on a plain and on a planned model and compare all bits."""
    plain, planned = make(kind), plan.apply(make(kind))
    torch.manual_seed(1)
    run(plain)
    expected = copy.deepcopy(state(plain))
    torch.manual_seed(1)
    run(planned)
    assert_same_tensors(expected, state(planned))


# -- apply and remove ----------------------------------------------------------------


def test_apply_changes_nothing_that_one_can_see(plan):
    """The same object, class, state_dict and attributes, but for its forward."""
    model = make()
    keys, attributes = list(model.state_dict()), set(model.__dict__)
    assert plan.apply(model) is model
    assert type(model) is Net
    assert list(model.state_dict()) == keys
    assert set(model.__dict__) - attributes == {"forward", "_remat_planned_forward"}
    assert applied_plan(model).plan is plan


def test_remove_gives_the_forward_back(plan):
    """After remove the instance has no forward of its own."""
    model = make()
    assert plan.remove(plan.apply(model)) is model
    assert "forward" not in model.__dict__
    assert applied_plan(model) is None


def test_remove_gives_an_own_forward_back(plan):
    """A forward that was set on the instance is there again."""
    model = make()
    own = model.forward
    model.forward = own
    Plan.remove(plan.apply(model))
    assert model.__dict__["forward"] is own


def test_applying_twice_keeps_one_plan(plan):
    """The second plan takes the place of the first, and one remove suffices."""
    model = make()
    other = optimize(model, sample(), budget_gb=1, loss_fn=square)
    plan.apply(model)
    other.apply(model)
    assert applied_plan(model).plan is other
    Plan.remove(model)
    assert not isinstance(model.forward, PlannedForward)


def test_planning_a_planned_model_plans_its_own_forward(plan):
    """A plan made on a planned model is the plan of the model itself."""
    model = plan.apply(make())
    again = optimize(model, sample(), budget_bytes=plan.budget_bytes, loss_fn=square)
    assert again.fingerprint == plan.fingerprint


def test_remove_without_a_plan():
    """Nothing to remove is an error that names the model."""
    with pytest.raises(PlanError, match="no plan is applied to this Net"):
        Plan.remove(make())


def test_unknown_policy(plan):
    """A misspelt policy is refused before anything is applied."""
    model = make()
    with pytest.raises(ValueError, match=r"'error', 'unplanned', 'replan'.*'eror'"):
        plan.apply(model, on_shape_change="eror")
    assert "forward" not in model.__dict__


def test_the_signature_stays(plan):
    """inspect.signature, which trainers use to choose columns, sees the model's own names."""
    import inspect

    model = plan.apply(make())
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]


# -- other modes ----------------------------------------------------------------------


def test_eval_runs_the_own_forward(plan):
    """In eval mode any shape is fine and outputs are those of the plain model."""
    plain, planned = make().eval(), plan.apply(make()).eval()
    assert torch.equal(plain(sample(rows=3)), planned(sample(rows=3)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_own_forward_runs(plan, context):
    """Training mode without gradients takes any shape."""
    model = plan.apply(make())
    with context():
        assert not model(sample(rows=3)).requires_grad


def test_training_goes_on_after_eval(plan):
    """Validation between two steps leaves the steps as they are."""

    def run(model):
        for i in range(2):
            model.train()
            model.zero_grad()
            square(model(sample(i))).backward()
            model.eval()
            model(sample(7, rows=5))

    assert_same_after(run, plan)


# -- another call ---------------------------------------------------------------------


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


# -- another state of the model -----------------------------------------------------------


def test_a_submodule_in_eval(plan):
    """A frozen batch norm is another step; the message names the module."""
    model = plan.apply(make())
    model.blocks[1][2].eval()
    with pytest.raises(CallMismatchError, match=r"'blocks\.1\.2' is in eval mode"):
        model(sample())


def test_a_parameter_frozen_after_planning(plan):
    """The message names the parameter."""
    model = plan.apply(make())
    model(sample())
    model.head.bias.requires_grad_(False)
    with pytest.raises(CallMismatchError, match=r"state\.head\.bias.*requires_grad"):
        model(sample())


def test_a_model_in_another_dtype(plan):
    """After .double() the call differs in its parameters."""
    model = plan.apply(make())
    model(sample())
    model.double()
    with pytest.raises(CallMismatchError, match="float64"):
        model(sample())


def test_parameters_with_other_strides(plan):
    """A weight whose memory is laid out differently is another step."""
    model = plan.apply(make())
    model(sample())
    weight = model.head.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(CallMismatchError, match=r"state\.head\.weight has strides"):
        model(sample())


def test_autocast_on(plan):
    """A plan in float32 is not for autocast; the message has both."""
    model = plan.apply(make())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(CallMismatchError, match="autocast is bfloat16, planned was off"),
    ):
        model(sample())


def test_autocast_off():
    """A plan under autocast is not for float32."""
    with torch.autocast("cpu", torch.bfloat16):
        plan = plan_for(make(), sample(), loss_fn=square, share=0.7)
    with pytest.raises(CallMismatchError, match="autocast is off, planned was bfloat16"):
        plan.apply(make())(sample())


def test_a_replaced_submodule_of_the_same_shape_is_used(plan):
    """A new head takes part in the next step; the old one gets no gradient."""

    def run(model):
        square(model(sample(1))).backward()
        model.zero_grad()
        model.head = make(lambda: nn.Linear(32, 4), seed=5)
        square(model(sample(2))).backward()

    assert_same_after(run, plan)


def test_a_replaced_submodule_of_another_kind_is_refused(plan):
    """A module that computes something else is not run by the old plan."""
    model = plan.apply(make())
    model(sample())
    model.blocks[1][1] = nn.ReLU()
    with pytest.raises(PlanMismatchError, match="operator"):
        model(sample())


def test_a_deleted_parameter_is_named(plan):
    """A parameter that is gone is a mismatch, no KeyError."""
    model = plan.apply(make())
    model(sample())
    model.head.bias = None
    with pytest.raises(PlanError, match=r"head\.bias"):
        model(sample())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32, bias=False)
        self.second = nn.Linear(32, 32, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x).sigmoid().exp()))


def test_an_untied_weight_is_noticed():
    """Weights that were one when planned and are two now are another step."""
    plan = optimize(make(Tied), sample(), budget_gb=1, loss_fn=square)
    model = plan.apply(make(Tied))
    model(sample())
    model.second.weight = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(PlanMismatchError, match="another model"):
        model(sample())


def test_replaced_parameters_are_used(plan):
    """A parameter that was assigned anew is the one that is trained."""

    def run(model):
        square(model(sample(1))).backward()
        model.zero_grad()
        model.head.weight = nn.Parameter(torch.ones(4, 32))
        square(model(sample(2))).backward()

    assert_same_after(run, plan)


def test_loading_weights_after_apply(plan):
    """load_state_dict works as before, and the next step uses the new weights."""

    def run(model):
        square(model(sample(1))).backward()
        model.zero_grad()
        model.load_state_dict(make(seed=9).state_dict())
        square(model(sample(2))).backward()

    assert_same_after(run, plan)


def test_a_model_with_other_weights(plan):
    """A plan holds no weights: it trains any model of the same shape."""
    plain, planned = make(seed=3), plan.apply(make(seed=3))
    for model in (plain, planned):
        torch.manual_seed(1)
        square(model(sample(1))).backward()
    assert_same_tensors(gradients(plain), gradients(planned))


class Wider(Net):
    def __init__(self) -> None:
        super().__init__(64)


class OtherActivation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1][1] = nn.ReLU()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Wider, r"state\.blocks\.0\.0\.weight is float32\[64, 64\].*planned was float32\[32, 32\]"),
        (OtherActivation, r"aten\.relu.*blocks\.1\.1.*planned was"),
        (lambda: nn.Linear(32, 4), r"state\.blocks\.0\.0\.weight is missing"),
        (lambda: make().requires_grad_(False), r"planned was float32.*requires_grad"),
        (lambda: make().double(), "float64"),
    ],
)
def test_another_model_is_refused_with_the_difference(plan, kind, named):
    """The message names the first thing that differs, and the model stays unplanned."""
    model = make(kind)
    with pytest.raises(PlanMismatchError, match=named):
        plan.apply(model)
    assert "forward" not in model.__dict__


def test_another_torch_version_is_refused(plan):
    """A plan of another version of torch is refused with both versions."""
    import dataclasses

    other = dataclasses.replace(plan, torch_version="1.0.0")
    with pytest.raises(PlanMismatchError, match=rf"1\.0\.0.*{torch.__version__[:4]}"):
        other.apply(make())


def test_apply_leaves_training_flags_and_generator(plan):
    """Applying to a model in eval mode captures it as planned and puts it back."""
    model = make().eval()
    before = torch.get_rng_state()
    plan.apply(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())


# -- copies -------------------------------------------------------------------------------


def _deepcopied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("copied", [_deepcopied, _pickled, _saved])
def test_a_copy_is_planned_and_trains_alone(plan, copied, used):
    """A copy carries the plan, has the bits of a plain copy, and leaves the original alone."""
    original = plan.apply(make())
    if used:
        square(original(sample(8))).backward()
        original.zero_grad()
        original.load_state_dict(make().state_dict())
    twin = copied(original)
    assert applied_plan(twin) is not None
    assert_same_training(make, lambda model: _with_weights(twin, model), sample, loss_fn=square)
    assert all(p.grad is None for p in original.parameters())
    assert_same_tensors(dict(make().state_dict()), dict(original.state_dict()))


def _with_weights(twin: nn.Module, model: nn.Module) -> nn.Module:
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_plan_can_be_pickled(plan):
    """Without the captured step, which lives in one process."""
    twin = pickle.loads(pickle.dumps(plan))
    assert twin == plan
    assert_same_training(make, twin.apply, sample, loss_fn=square)


def test_two_planned_models_in_one_process(plan):
    """Steps of two models in turn do not disturb each other."""

    def run(model):
        other = plan.apply(make(seed=4))
        for i in range(2):
            model.zero_grad()
            other.zero_grad()
            output = model(sample(i))
            square(other(sample(i + 5))).backward()
            square(output).backward()

    assert_same_after(run, plan)


def test_a_planned_part_of_a_model():
    """Gradients flow through a planned submodule to what comes before it."""

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 32), Net(), nn.Linear(4, 1))

    plan = plan_for(make(), sample().requires_grad_(), loss_fn=square)

    def apply(model):
        plan.apply(model[1])
        return model

    assert_same_training(
        lambda: build().train(), apply, lambda i: sample(i, width=16), loss_fn=square
    )


# -- autograd ----------------------------------------------------------------------------


def test_gradients_accumulate(plan):
    """Two backward calls without zero_grad add up; that the budget does not count it is said."""
    with pytest.warns(PlanWarning, match=r"kB of gradients are there when a planned step begins"):
        assert_same_after(lambda m: [square(m(sample(i))).backward() for i in range(2)], plan)


def test_gradients_that_fit_beside_a_step_are_not_mentioned():
    """Where the budget has room for one more set of gradients there is nothing to say."""
    model = optimize(make(), sample(), budget_gb=1, loss_fn=square).apply(make())
    for i in range(2):
        square(model(sample(i))).backward()


def test_two_forwards_before_one_backward(plan):
    """The saved tensors of two steps live side by side, which is said."""
    with pytest.warns(PlanWarning, match="counts 1. Plan with concurrent_calls=2"):
        assert_same_after(lambda m: (square(m(sample(1))) + square(m(sample(2)))).backward(), plan)


def test_a_forward_without_a_backward_is_no_second_one(plan):
    """A call whose output is dropped waits for nothing; neither does a loss kept after backward."""
    model = plan.apply(make())
    model(sample(0))
    loss = square(model(sample(1)))
    loss.backward()
    model.zero_grad()
    square(model(sample(2))).backward()
    assert applied_plan(model).planned_steps == 3


def test_two_forwards_and_their_backwards_in_either_order(plan):
    """First forward, second forward, first backward, second backward."""

    def run(model):
        losses = [square(model(sample(i))) for i in range(2)]
        for loss in losses:
            loss.backward()

    with pytest.warns(PlanWarning):
        assert_same_after(run, plan)


def test_an_output_that_was_written_to_is_noticed():
    """What backward reads of an output is looked at for writes by others, as in eager."""

    def ends_in_tanh() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh())

    plan = optimize(make(ends_in_tanh), sample(), budget_gb=1)
    output = plan.apply(make(ends_in_tanh))(sample())
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_retain_graph(plan):
    """Backward may run twice where the graph is retained, recomputing twice."""

    def run(model):
        loss = square(model(sample(1)))
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.warns(PlanWarning, match="retain_graph=True"):
        assert_same_after(run, plan)


def test_backward_twice_without_retaining(plan):
    """The second backward is autograd's own error."""
    loss = square(plan.apply(make())(sample(1)))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_autograd_grad(plan):
    """torch.autograd.grad of some parameters gives the same bits as in eager."""
    found = []
    for model in (make(), plan.apply(make())):
        torch.manual_seed(1)
        chosen = [model.head.weight, model.blocks[0][0].bias]
        found.append(dict(enumerate(torch.autograd.grad(square(model(sample(1))), chosen))))
    assert_same_tensors(*found)


def test_backward_of_a_sum_of_two_outputs(heads_plan):
    """Both outputs take part in one loss."""

    def run(model):
        left, right = model(sample(1))
        (left.square().sum() + right.sum()).backward()

    assert_same_after(run, heads_plan, Heads)


def test_backward_of_several_outputs_at_once(heads_plan):
    """torch.autograd.backward with a gradient for each output, the planned step itself."""

    def run(model):
        outputs = model(sample(1))
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])

    assert_same_after(run, heads_plan, Heads)


def test_the_output_is_the_callers_to_change(plan):
    """An output may be changed in place before the loss, as in eager."""
    assert_same_after(lambda m: square(m(sample(1)).mul_(0.5)).backward(), plan)


def test_a_scalar_loss_may_be_divided_in_place():
    """``loss /= 4`` before backward, as loops that accumulate gradients do."""

    class Loss(Net):
        def forward(self, x):
            return square(super().forward(x))

    def run(model):
        loss = model(sample(1))
        loss /= 4
        loss.backward()

    assert_same_after(run, plan_for(make(Loss), sample()), Loss)


def test_a_gradient_may_be_looked_at(plan):
    """retain_grad and tensor hooks on the output see the gradient that eager sees."""
    seen = []
    for model in (make(), plan.apply(make())):
        torch.manual_seed(1)
        output = model(sample(1))
        output.retain_grad()
        hooked = []
        output.register_hook(hooked.append)
        square(output).backward()
        seen.append({"retained": output.grad, "hooked": hooked[0]})
    assert_same_tensors(*seen)


def test_a_gradient_in_another_layout(plan):
    """A transposed gradient arrives right."""

    def run(model):
        output = model(sample(1))
        (output.t().contiguous() * torch.arange(256.0)).t().sum().backward()

    assert_same_after(run, plan)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks_fire(plan):
    """Hooks of the root module and of parameters fire as often, in training and in backward."""

    def fired(model):
        calls = []
        model.register_forward_pre_hook(lambda m, args: calls.append("before"))
        model.register_forward_hook(lambda m, args, out: calls.append("after"))
        model.register_full_backward_hook(lambda m, grads, out: calls.append("backward"))
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name: calls.append(name))
            p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(f"{name} done"))
        square(model(sample(1))).backward()
        return sorted(calls)

    assert fired(plan.apply(make())) == fired(make())


def test_a_parameter_hook_changes_the_gradient(plan):
    """What a hook returns is what is accumulated."""

    def run(model):
        model.head.weight.register_hook(lambda g: g * 3)
        square(model(sample(1))).backward()

    assert_same_after(run, plan)


def test_a_gradient_is_not_shared(plan):
    """No two gradients lie in one memory, so that each may be scaled in place."""
    model = plan.apply(make())
    square(model(sample(1))).backward()
    places = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_step(plan, kind):
    """Three steps of an optimizer leave the same weights."""

    def run(model):
        optimizer = kind(model.parameters(), lr=0.01)
        for i in range(3):
            optimizer.zero_grad()
            square(model(sample(i))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    assert_same_after(run, plan)


def test_nothing_is_left_after_a_step(plan):
    """A second step takes no more memory than the first."""
    model = plan.apply(make())
    first, second = (measure(model, sample(), loss_fn=square, repeats=0) for _ in range(2))
    assert first.peak_bytes == second.peak_bytes <= plan.budget_bytes


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_a_nan_under_anomaly_detection_is_said_to_be_in_the_planned_step(plan):
    """Autograd's own error names one function for the whole step."""
    model = plan.apply(make())
    with (
        torch.autograd.detect_anomaly(),
        pytest.warns(PlanWarning, match=r"unplanned\(model\)"),
        pytest.raises(RuntimeError, match="nan values"),
    ):
        model(sample() * float("nan")).sum().backward()


def test_anomaly_detection(plan):
    """Under detect_anomaly, as in eager."""

    def run(model):
        with (
            pytest.warns(UserWarning, match="Anomaly Detection"),
            torch.autograd.detect_anomaly(),
        ):
            square(model(sample(1))).backward()

    assert_same_after(run, plan)


# -- compilers ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_planned_model_in_torch_compile(plan):
    """torch.compile around a planned model leaves the planned step alone."""
    plain, planned = make(), plan.apply(make())
    for model in (plain, torch.compile(planned, backend="eager")):
        torch.manual_seed(1)
        square(model(sample(1))).backward()
    assert_same_tensors(gradients(plain), gradients(planned))


def test_functional_call(plan):
    """torch.func.functional_call swaps the parameters in, and the plan uses those."""
    other = {name: p.detach() + 0.1 for name, p in make().named_parameters()}
    found = []
    for model in (make(), plan.apply(make())):
        weights = {name: t.clone().requires_grad_() for name, t in other.items()}
        torch.manual_seed(1)
        square(torch.func.functional_call(model, weights, (sample(1),))).backward()
        found.append({name: t.grad for name, t in weights.items()})
    assert_same_tensors(*found)


def test_parameters_that_lie_in_memory_beside_others_are_said(plan):
    """functional_call with a second set of parameters holds both, which the budget cannot."""
    model = plan.apply(make())
    square(model(sample())).backward()
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.warns(PlanWarning, match="still in memory that others took the place of"):
        square(torch.func.functional_call(model, others, (sample(),))).backward()
