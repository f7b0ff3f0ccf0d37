"""What is put on, taken off or put in the place of a part of a planned model later."""

from __future__ import annotations

import copy
import functools
import gc
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

from benchmarks.testing.bitwise import assert_same_tensors
from planner import (
    CallMismatchError,
    Plan,
    PlanMismatchError,
    PlanWarning,
    applied_plan,
    optimize,
)
from planner.running import planned_call
from tests.planner.small import Net, make, plan_for, sample, square


def planned(kind=Net, policy="error", **options) -> nn.Module:
    options = {"budget_gb": 1, "loss_fn": square, **options}
    return optimize(make(kind), sample(), **options).apply(make(kind), on_shape_change=policy)


def trained(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = square(model(sample(seed)))
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda _m, _args, out: out * 0.5),
    "before": lambda m: m.register_forward_pre_hook(lambda _m, args: (args[0] + 1,)),
    "backward": lambda m: m.register_full_backward_hook(lambda _m, grads, _out: (grads[0] * 2,)),
}


@pytest.mark.filterwarnings("ignore:a training step of a planned Net:planner.PlanWarning")
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    ("policy", "first"),
    [("error", True), ("unplanned", False), ("replan", True), ("replan", False)],
    ids=["error", "unplanned", "before the first step", "later"],
)
def test_a_hook_on_a_submodule(kind, policy, first):
    """A hook that changes the step is an error that names it, or its step is eager's."""
    eager, model = make(), planned(policy=policy)
    if not first:
        assert_same_tensors(trained(eager), trained(model))
    handles = [HOOKS[kind](m.blocks[1][1]) for m in (eager, model)]
    if policy == "error":
        with pytest.raises(PlanMismatchError, match=r"a hook was put on module 'blocks\.1\.1'"):
            model(sample())
    else:
        assert_same_tensors(trained(eager, 1), trained(model, 1))
    for handle in handles:
        handle.remove()
    assert_same_tensors(trained(eager, 2), trained(model, 2))


def test_the_order_of_hooks_stays():
    """A hook put in front of another runs first, before planning and after."""
    eager, model = make(), make()
    for each in (eager, model):
        each.head.register_forward_hook(lambda _m, _args, out: out * 2)
        each.head.register_forward_hook(lambda _m, _args, out: out + 1, prepend=True)
    order = list(model.head._forward_hooks)
    optimize(model, sample(), budget_gb=1, loss_fn=square).apply(model)
    assert list(model.head._forward_hooks) == order
    assert_same_tensors(trained(eager), trained(model))


def test_parameters_that_are_computed_take_a_planned_step():
    """As a first step of a learner of learners has it: the gradient goes on to what they are of."""
    kind = lambda: nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    found = []
    for model in (make(kind), planned(kind, loss_fn=torch.mean)):
        fast = {name: p * 0.5 for name, p in model.named_parameters()}
        torch.func.functional_call(model, fast, (sample(),)).mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_tensors(*found)


def test_a_hook_that_changes_nothing():
    """The step is captured again and runs by the plan."""
    model = planned()
    model.blocks[0].register_forward_hook(lambda _m, _args, _out: None)
    assert_same_tensors(trained(make()), trained(model))
    assert applied_plan(model).planned_steps == 1


def test_another_forward_of_a_submodule():
    """A function that was put in the place of a submodule's forward is run."""

    def double(model: nn.Module) -> None:
        head = model.head
        head.forward = lambda x: nn.functional.linear(x, head.weight, head.bias) * 2

    eager, model = make(), planned(policy="replan")
    trained(model)
    double(eager)
    double(model)
    assert_same_tensors(trained(eager, 1), trained(model, 1))


def test_captures_that_are_known_are_not_made_again(monkeypatch):
    """A hook that comes and goes is captured once, and said to cost time when there are many."""
    from planner.running import planned_call

    captures = []
    monkeypatch.setattr(
        planned_call,
        "capture_for",
        lambda *a, f=planned_call.capture_for, **k: captures.append(1) or f(*a, **k),
    )
    model = planned()
    with pytest.warns(PlanWarning, match=r"captured again 3 times.*hook was put on"):  # noqa: PT031
        for _ in range(3):
            handle = model.blocks[0].register_forward_hook(lambda _m, _args, _out: None)
            trained(model)
            handle.remove()
            trained(model)
    assert len(captures) == 3  # each hook is another one, without any is what was planned


def test_a_pruned_model_is_another_one():
    """Pruning puts a mask between a weight and its use; the error says what differs."""
    model = planned()
    prune.l1_unstructured(model.head, "weight", 0.3)
    with pytest.raises(PlanMismatchError, match="another model"):
        model(sample())


# -- training steps that never come to the plan ---------------------------------------------


def test_a_replaced_forward_is_said_once():
    """A trainer puts its own function in the place of forward: one warning, which names it."""

    def fused_forward(self: nn.Module, x: Tensor) -> Tensor:
        return Net.forward(self, x) * 1.0

    model = planned()
    model.forward = types.MethodType(fused_forward, model)
    with pytest.warns(PlanWarning, match=r"forward was replaced by .*fused_forward.*trainer first"):
        trained(model)
    trained(model)
    applied = applied_plan(model)
    assert (applied.planned_steps, applied.unplanned_steps) == (0, 2)
    assert "fused_forward" in applied.last_mismatch
    Plan.remove(model)
    trained(model)
    assert applied_plan(model) is None


def test_a_loop_that_calls_a_part():
    """A module is planned, its training step calls a submodule: one warning that says so."""

    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, x: Tensor) -> Tensor:
            return square(self.model(x))

    model = planned(Lightning)
    with pytest.warns(PlanWarning, match="did not call this Lightning, but a part of it"):
        model.training_step(sample()).backward()
    assert applied_plan(model).unplanned_steps == 1


def test_planned_steps_are_counted_and_nothing_is_said():
    """Ordinary training, evaluation between, is silent."""
    model = planned()
    for i in range(3):
        trained(model, i)
        model.eval()
        model(sample())
        model.train()
    applied = applied_plan(model)
    assert (applied.planned_steps, applied.unplanned_steps) == (3, 0)
    assert applied.last_mismatch is None


def test_unplanned_steps_are_said_once():
    """on_shape_change="unplanned" warns at the first such step, with what differed."""
    model = planned(policy="unplanned")
    with pytest.warns(PlanWarning, match=r"not run by its plan.*float32\[17, 32\]"):
        square(model(sample(rows=17))).backward()
    square(model(sample(rows=17))).backward()
    applied = applied_plan(model)
    assert (applied.planned_steps, applied.unplanned_steps) == (0, 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_func_run_the_own_forward():
    """Under grad, vmap or jvp the module answers as without a plan, and says so once."""
    kind = lambda: nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    model, eager = planned(kind, loss_fn=torch.mean), make(kind)
    weights = {n: p.detach() for n, p in eager.named_parameters()}

    def gradient(m: nn.Module) -> dict[str, Tensor]:
        return torch.func.grad(lambda w: torch.func.functional_call(m, w, (sample(),)).mean())(
            weights
        )

    with pytest.warns(PlanWarning, match=r"transform of torch\.func"):
        found = gradient(model)
    assert_same_tensors(gradient(eager), found)
    _, tangent = torch.func.jvp(model, (sample(),), (torch.ones(256, 32),))
    assert_same_tensors(
        {"tangent": torch.func.jvp(eager, (sample(),), (torch.ones(256, 32),))[1]},
        {"tangent": tangent},
    )


class _Doubles(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.tanh else result


def test_a_mode_that_hears_functions_runs_the_own_forward():
    """What it makes of a call is what eager makes of it, and it is said once."""
    kind = lambda: nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    model, eager = planned(kind), make(kind)
    with pytest.warns(PlanWarning, match="TorchFunctionMode"), _Doubles():
        found = model(sample())
    with _Doubles():
        assert torch.equal(found, eager(sample()))
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("error")
        assert_same_tensors(trained(eager), trained(model))


def _traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, sample(), check_trace=False)


def _exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (sample(),)).module()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
@pytest.mark.parametrize("transform", [_traced, _exported])
def test_tracers_see_the_own_forward(transform):
    """torch.jit.trace and torch.export record the model's operators, and it is said once."""
    model = planned()
    with pytest.warns(PlanWarning, match=r"it is called by torch\.(jit\.trace|export)"):
        traced = transform(model)
    torch.manual_seed(1)
    found = square(traced(sample()))
    torch.manual_seed(1)
    assert torch.equal(found, square(make()(sample())))


def test_saved_tensors_hooks_see_what_the_model_saves():
    """Hooks that round what is saved change gradients as in eager, and it is said once."""

    def rounded(model: nn.Module) -> dict[str, Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.bfloat16() if t.dtype == torch.float32 else t,
            lambda t: t.float() if t.dtype == torch.bfloat16 else t,
        ):
            return trained(model)

    model = planned()
    with pytest.warns(PlanWarning, match="saved_tensors_hooks"):
        found = rounded(model)
    assert_same_tensors(rounded(make()), found)
    assert applied_plan(model).unplanned_steps == 1


def test_forward_mode_derivatives_are_the_models_own():
    """Dual numbers go through the model's own forward, and it is said once."""
    kind = lambda: nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))  # noqa: E731
    tangents = []
    for model in (make(kind), planned(kind, loss_fn=torch.mean)):
        with warnings.catch_warnings(record=True) as said, forward_ad.dual_level():
            warnings.simplefilter("always")
            output = model(forward_ad.make_dual(sample(), sample(1)))
            tangents.append(forward_ad.unpack_dual(output).tangent.detach())
    assert torch.equal(*tangents)
    assert ["dual_level" in str(w.message) for w in said if w.category is PlanWarning] == [True]


def test_another_class_is_seen():
    """A module whose class is exchanged, as FSDP2 and parametrizations do, is another one."""

    class Doubled(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x, scale) * 2

    model = planned()
    trained(model)
    model.__class__ = Doubled
    with pytest.raises(PlanMismatchError, match="module '' is a Doubled, was a Net"):
        model(sample())


def test_training_in_eval_mode_is_named_so():
    """A training step in eval mode, which is the own forward's, is said to be that."""
    model = planned()
    trained(model)
    model.eval()
    with pytest.warns(PlanWarning, match="is in eval mode, in which it runs its own forward"):
        trained(model)


@pytest.mark.filterwarnings("ignore:a training step of a planned Net:planner.PlanWarning")
@pytest.mark.parametrize("policy", ["unplanned", "replan"])
def test_a_model_that_stays_changed_is_captured_once(policy, monkeypatch):
    """Later steps of a changed model do not capture anew, nor does one that is changed back."""
    captures = []
    own = planned_call.capture_for
    monkeypatch.setattr(
        planned_call, "capture_for", lambda *a, **k: captures.append(1) or own(*a, **k)
    )
    eager, model = make(), planned(policy=policy)
    for p in (0.2, 0.0, 0.0, 0.0, 0.2):
        eager.dropout.p = model.dropout.p = p
        assert_same_tensors(trained(eager), trained(model))
    assert len(captures) == 1


# -- bound, wrapped and unwrapped ---------------------------------------------------------


def wrapped(forward):
    @functools.wraps(forward)
    def convert(*args, **kwargs):
        return forward(*args, **kwargs)

    return convert


def test_a_plan_survives_being_wrapped_and_unwrapped_as_a_method():
    """As accelerate does it: the wrapped forward is bound, later what it wraps is bound."""
    eager, model = make(), planned()
    original = model.forward
    model.forward = types.MethodType(wrapped(original), model)
    assert_same_tensors(trained(eager), trained(model))
    model.forward = types.MethodType(original, model)
    for mode in (True, False):
        model.train(mode)
        model(sample())
    assert applied_plan(model).planned_steps == 2
    Plan.remove(model)
    assert "forward" not in model.__dict__
    assert applied_plan(model) is None


def test_a_plan_can_be_taken_off_behind_a_wrapper():
    """What still calls it runs the model's own forward."""
    model = planned()
    model.forward = types.MethodType(wrapped(model.forward), model)
    Plan.remove(model)
    assert applied_plan(model) is None
    assert_same_tensors(trained(make()), trained(model))


def test_a_planned_model_that_is_gone_is_gone():
    """The watched parameter keeps no cycle alive that the collector cannot see."""
    model = planned()
    trained(model)
    references = [weakref.ref(model), weakref.ref(model.forward)]
    del model
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_a_copy_is_watched_on_its_own():
    """A copy of a planned model that trains otherwise says so for itself."""
    model = planned()
    trained(model)
    twin = copy.deepcopy(model)
    trained(twin)
    with pytest.warns(PlanWarning, match="a part of"):
        twin.blocks[0](sample()).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model)


@pytest.mark.parametrize("lazy", ["conj", "neg"])
def test_a_lazy_conjugate_is_another_call(lazy):
    """Kernels resolve the bit in ways of their own; the error says how to resolve it before."""
    model = planned(loss_fn=square)
    x = torch._neg_view(sample())
    assert x.is_neg()
    if lazy == "conj":
        kind = lambda: nn.Linear(32, 4, dtype=torch.complex64)  # noqa: E731
        plain = torch.complex(sample(), sample())
        loss_fn = lambda o: o.abs().mean()  # noqa: E731
        model = optimize(make(kind), plain, budget_gb=1, loss_fn=loss_fn).apply(make(kind))
        x = plain.conj()
    with pytest.raises(CallMismatchError, match=rf"lazy {lazy}.*resolve_{lazy}\(\)"):
        model(x)
    with pytest.raises(ValueError, match=rf"lazy {lazy}.*resolve_{lazy}\(\)"):
        optimize(model, x, budget_gb=1, loss_fn=square)


def test_an_argument_that_a_trainer_adds_is_explained():
    """The difference says who adds it, and what to do, also where the model changed as well."""

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.rectified = Net(), False

        def forward(self, x: Tensor, **kwargs: object) -> Tensor:
            return self.net(x).relu() if self.rectified else self.net(x)

    model = planned(Language)
    extra = {"num_items_in_batch": torch.tensor(4)}
    with pytest.raises(CallMismatchError, match=r"Transformers' Trainer adds.*in the sample, too"):
        model(sample(), **extra)
    model.rectified = True
    with pytest.raises(PlanMismatchError, match=r"'rectified' is True.*differs, too.*Trainer adds"):
        model(sample(), **extra)


def test_a_wrapper_stays_when_another_plan_is_applied() -> None:
    """What somebody has put around a planned forward goes on around the next plan."""
    model = make()
    plan = plan_for(make(), sample(), loss_fn=square)
    plan.apply(model).eval()
    inner = model.forward

    @functools.wraps(inner)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs) * 2

    model.forward = doubled
    model.train()
    optimize(model, sample(), budget_gb=1, loss_fn=square).apply(model)
    torch.manual_seed(1)
    twice = model(sample())
    torch.manual_seed(1)
    assert torch.equal(twice, make()(sample()) * 2)
    assert applied_plan(model).planned_steps == 1


def test_the_watched_parameter_is_not_kept() -> None:
    """A hook on a tensor is not seen by the collector: it holds nothing."""
    model = plan_for(make(), sample(), loss_fn=square).apply(make())
    square(model(sample())).backward()
    gone = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_a_term_of_parameters_is_no_unplanned_step() -> None:
    """A regularizer with a backward pass of its own is said to be outside of the plan."""
    model = plan_for(make(), sample(), loss_fn=square).apply(make())
    square(model(sample())).backward()
    with pytest.warns(PlanWarning, match="a term of the loss that is made of parameters"):
        sum(p.square().sum() for p in model.parameters()).backward()
    assert applied_plan(model).unplanned_steps == 0


def test_a_forward_replaced_after_planned_steps_is_counted() -> None:
    """Whatever the loop does with the gradients of the step before."""
    model = plan_for(make(), sample(), loss_fn=square).apply(make())
    square(model(sample())).backward()
    model.zero_grad(set_to_none=False)
    model.forward = functools.partial(type(model).forward, model)
    with pytest.warns(PlanWarning, match="forward was replaced") as said:
        square(model(sample())).backward()
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        square(model(sample())).backward()
    assert applied_plan(model).unplanned_steps == 3
    assert said[0].filename == __file__
