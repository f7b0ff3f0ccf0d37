"""Arguments of optimize, and the plan that it returns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from planner import CaptureError, Plan, applied_plan, measure, optimize, unplanned
from solvers.replay import replay
from solvers.schedule import Schedule
from tests.planner.small import Heads, Net, make, plan_for, sample, square


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that recomputes."""
    return plan_for(make(), sample(), loss_fn=square)


# -- the sample -----------------------------------------------------------------------


@pytest.mark.parametrize("given", [sample(), (sample(),), [sample()], {"x": sample()}])
def test_a_sample_in_each_way(given, plan):
    """A tensor, a tuple, a list and a dict of the same input give the same step."""
    assert optimize(make(), given, budget_gb=1, loss_fn=square).fingerprint == plan.fingerprint


def test_values_of_the_sample_do_not_matter(plan):
    """Only shapes, dtypes and devices are looked at."""
    nans = torch.full_like(sample(), math.nan)
    assert optimize(make(), nans, budget_gb=1, loss_fn=square).fingerprint == plan.fingerprint


@pytest.mark.parametrize("given", [None, "x", 3, sample])
def test_a_sample_of_another_kind(given):
    """The message says what a sample is."""
    with pytest.raises(TypeError, match="sample_input must be a tensor, a tuple"):
        optimize(make(), given, budget_gb=1)


@pytest.mark.parametrize(
    ("given", "named"),
    [({}, "'x'"), ({"y": sample()}, "'x'|'y'"), ((sample(), 1.0, 2), "too many positional")],
)
def test_a_sample_that_does_not_fit_the_signature(given, named):
    """The message is that of a wrong call."""
    with pytest.raises(TypeError, match=named):
        optimize(make(), given, budget_gb=1)


def test_a_shape_that_the_model_refuses():
    """The message has the model's own and the line that raised it."""
    with pytest.raises(CaptureError, match=r"\[256, 7\] X \[32, 32\].*small\.py:\d+ in forward"):
        optimize(make(), sample(width=7), budget_gb=1)


# -- model and loss ---------------------------------------------------------------------


def test_a_function_is_no_model():
    """Only a module can be planned."""
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got a function"):
        optimize(square, sample(), budget_gb=1)


@pytest.mark.parametrize(
    "asked", [Plan.remove, applied_plan, lambda model: unplanned(model).__enter__()]
)
def test_none_is_no_model(asked):
    """Whatever is asked of it, the message says what a model is."""
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got a NoneType"):
        asked(None)


def test_a_model_in_eval_mode():
    """A plan is for training; the message says how to get there."""
    with pytest.raises(ValueError, match=r"eval mode.*model\.train\(\)"):
        optimize(make().eval(), sample(), budget_gb=1)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_a_scripted_or_compiled_model():
    """Models that run graphs of their own are refused, and the message says what to plan."""
    for model in (torch.jit.script(make(lambda: nn.Linear(32, 4))), torch.compile(make())):
        with pytest.raises(ValueError, match="plan the module that was compiled or scripted"):
            optimize(model, sample(), budget_gb=1)


def test_a_model_without_trainable_parameters():
    """Nothing to train is an error that asks why."""
    with pytest.raises(CaptureError, match="frozen by mistake"):
        optimize(make().requires_grad_(False), sample(), budget_gb=1)


def test_a_model_without_parameters_but_with_a_gradient_to_pass_on():
    """An input that wants a gradient is something to differentiate."""
    plan = optimize(nn.Tanh(), sample().requires_grad_(), budget_gb=1, loss_fn=square)
    assert any(s.category == "gradient" for s in plan.graph.storages)


@pytest.mark.parametrize(
    ("loss_fn", "named"),
    [
        (lambda y: y, r"scalar tensor, got torch\.Size\(\[256, 4\]\)"),
        (lambda y: 3.0, "scalar tensor, got 3.0"),
        (lambda y: y.detach().sum(), "does not depend on the output"),
        (lambda y: torch.ones((), requires_grad=True), "does not depend on the output"),
        (lambda y: y.sum().item(), "scalar tensor, got -"),
    ],
)
def test_a_loss_that_is_none(loss_fn, named):
    """The message says what loss_fn returned, or where it failed."""
    with pytest.raises(CaptureError, match=named):
        optimize(make(), sample(), budget_gb=1, loss_fn=loss_fn)


# -- options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "kind", "named"),
    [
        ({"solver": "auot"}, ValueError, "'auot'; did you mean 'auto'"),
        ({"optimizer": "adamwx"}, ValueError, "'adamwx'; did you mean 'adamw'"),
        ({"device": "h10"}, ValueError, "'h10'; did you mean 'h100'"),
        ({"solver": "magic"}, ValueError, "unknown solver 'magic'; known are auto"),
        ({"optimizer": "magic"}, ValueError, "unknown optimizer 'magic'; one of"),
        ({"optimizer": 3}, TypeError, "optimizer must be an instance or a name"),
        ({"solver": None}, ValueError, "unknown solver None; known are auto"),
        ({"device": 5}, ValueError, "unknown device 5; known are cpu"),
        ({"autocast": "bf16"}, ValueError, "autocast is a dtype such as torch.bfloat16"),
        ({"autocast": torch.int32}, ValueError, "autocast is a dtype such as torch.bfloat16"),
        ({"gap": "x"}, ValueError, "gap must be finite"),
        ({"time_limit_s": None}, ValueError, "time_limit_s"),
        ({"time_limit_s": -1}, ValueError, "time_limit_s"),
        ({"time_limit_s": math.nan}, ValueError, "time_limit_s"),
        ({"time_limit_s": math.inf}, ValueError, "time_limit_s"),
        ({"seed": 0.5}, ValueError, "seed"),
        ({"seed": "0"}, ValueError, "seed"),
        ({"loss_fn": 3}, ValueError, "loss_fn"),
        ({"progress": 3}, ValueError, "progress"),
        ({"never_recompute": "head"}, ValueError, r"\('head',\)"),
        ({"always_recompute": "head"}, ValueError, r"\('head',\)"),
        ({"never_recompute": [5]}, ValueError, r"never_recompute takes .*, got \[5\]"),
        ({"always_recompute": None}, ValueError, "always_recompute takes .*, got None"),
        ({"granularity": "blocks", "blocks": 5}, ValueError, "blocks is a pattern .* got 5"),
        ({"never_recompute": ["nothing"]}, CaptureError, "never_recompute names 'nothing'"),
        ({"always_recompute": ["nothing"]}, CaptureError, "always_recompute names 'nothing'"),
    ],
)
def test_an_option_that_makes_no_sense(option, kind, named):
    """Each is refused by name before anything is solved."""
    with pytest.raises(kind, match=named):
        optimize(make(), sample(), budget_gb=1, **option)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("option", [{"budget_gb": 0}, {}, {"budget_gb": 1, "budget_bytes": 1}])
def test_a_budget_that_makes_no_sense(option):
    """The budget is checked by optimize, too."""
    with pytest.raises(ValueError, match=r"budget|amount of memory"):
        optimize(make(), sample(), **option)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: "sgd",
        lambda p: "sgd_momentum",
        lambda p: "adam",
        lambda p: "AdamW",
        lambda p: "rmsprop",
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, foreach=False),
        lambda p: torch.optim.NAdam(p),
    ],
)
def test_state_of_the_optimizer_is_counted_exactly(build):
    """Predicted resident bytes and peak are those of a real step with the optimizer."""
    model = make()
    optimizer = build(model.parameters())
    plan = optimize(model, sample(), budget_gb=1, loss_fn=square, optimizer=optimizer)
    instance = optimizer
    if optimizer == "sgd_momentum":
        instance = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    planned = plan.apply(model)
    measured = measure(planned, sample(), loss_fn=square, optimizer=instance, repeats=0)
    assert plan.graph.resident_bytes == measured.resident_bytes
    assert measured.peak_bytes == pytest.approx(plan.predicted_peak_bytes, rel=0.01)
    assert measured.peak_bytes <= plan.predicted_peak_bytes


def _targets(plan: Plan, named: str) -> set[int]:
    operators = plan.graph.operators
    return {v for v, op in enumerate(operators) if op.module_path.startswith(named)}


def test_never_recompute_is_kept():
    """What a free plan recomputes is not recomputed once it is named, at no gain in time."""
    free = plan_for(make(), sample(), loss_fn=square, share=0.8, time_limit_s=3)
    named = next(free.graph.operators[v].module_path for v in free.schedule.recomputed())
    held = optimize(
        make(),
        sample(),
        budget_bytes=free.budget_bytes,
        loss_fn=square,
        never_recompute=[named],
        time_limit_s=3,
    )
    assert not set(held.schedule.recomputed()) & _targets(held, named)
    assert held.predicted_step_us >= free.predicted_step_us


def test_always_recompute_is_done():
    """With room for all, what is named is recomputed nevertheless and saves memory."""
    free = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    forced = optimize(make(), sample(), budget_gb=1, loss_fn=square, always_recompute=["aten.gelu"])
    gelus = [op for op in forced.graph.operators if op.name.endswith("_repeated")]
    assert {op.target for op in gelus} == {"aten.gelu.default"}
    assert forced.predicted_step_us > free.predicted_step_us
    assert forced.baseline_step_us == free.baseline_step_us


def test_progress_receives_events():
    """A function sees bound and incumbent while the solver runs."""
    events = []
    plan_for(make(), sample(), loss_fn=square, progress=events.append)
    assert events
    assert all(event.bound_ns >= 0 for event in events)


def test_a_progress_bar_prints_nothing_that_stays(capsys):
    """progress=True leaves no line behind, and progress=None prints nothing at all."""
    optimize(make(), sample(), budget_gb=1, loss_fn=square)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("solver", ["auto", "uniform", "keep_all"])
def test_each_solver_by_name(solver):
    """With room for all, every solver has a plan."""
    plan = optimize(make(), sample(), budget_gb=1, loss_fn=square, solver=solver, time_limit_s=1)
    assert plan.predicted_peak_bytes <= plan.budget_bytes


def test_the_same_seed_gives_the_same_plan(plan):
    """Planning again with the same seed gives the same schedule."""
    again = optimize(make(), sample(), budget_bytes=plan.budget_bytes, loss_fn=square)
    assert again.schedule == plan.schedule
    assert again.lower_bound_us == plan.lower_bound_us


# -- the plan -----------------------------------------------------------------------------


def test_figures_are_those_of_replay(plan):
    """Peak and time are what replay says of the schedule."""
    outcome = replay(plan.graph, plan.schedule)
    assert plan.predicted_peak_bytes == outcome.peak_bytes <= plan.budget_bytes
    assert plan.predicted_step_us == outcome.cost_ns / 1e3
    assert plan.overhead == plan.predicted_step_us / plan.baseline_step_us - 1
    assert plan.overhead > 0
    assert plan.gap == pytest.approx(plan.predicted_step_us / plan.lower_bound_us - 1, abs=1e-12)


def test_the_lower_bound_is_below_keeping_all(plan):
    """No bound lies above what keeping everything would take, nor above the plan."""
    keep = replay(plan.graph, Schedule.keep_all(plan.graph))
    assert keep.cost_ns / 1e3 <= plan.predicted_step_us
    assert plan.lower_bound_us <= plan.predicted_step_us


@pytest.mark.parametrize("optimizer", [None, "adamw"])
def test_memory_by_category_sums_to_the_peak(optimizer):
    """Every byte of the peak has a category, and the operator at the peak has a name."""
    for share in (0.6, 1.0):
        planned = (
            plan_for(make(), sample(), loss_fn=square, optimizer=optimizer, share=share)
            if share < 1
            else optimize(make(), sample(), loss_fn=square, optimizer=optimizer, budget_gb=1)
        )
        memory = planned.memory
        assert sum(memory.by_category.values()) == memory.total_bytes
        assert memory.total_bytes == planned.predicted_peak_bytes
        assert memory.operator in {op.name for op in planned.graph.operators}
    parameters = sum(p.nbytes for p in make().parameters())
    assert memory.by_category["parameter"] == parameters


def test_a_plan_is_frozen(plan):
    """A plan cannot be changed after the fact."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.budget_bytes = 1


def test_the_fingerprint_tells_steps_apart(plan):
    """Another width, shape, loss or optimizer is another step; other weights are not."""
    same = optimize(make(seed=5), sample(), budget_gb=2, loss_fn=square)
    assert same.fingerprint == plan.fingerprint
    others = [
        optimize(make(lambda: Net(64)), sample(width=64), budget_gb=1, loss_fn=square),
        optimize(make(), sample(rows=128), budget_gb=1, loss_fn=square),
        optimize(make(), sample(), budget_gb=1, loss_fn=square, optimizer="adamw"),
        optimize(make(), sample(), budget_gb=1),
        optimize(make(Heads), sample(), budget_gb=1),
    ]
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 6
