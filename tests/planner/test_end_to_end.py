"""Whole way on every model: the same bits, never above the budget, as predicted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.testing.bitwise import (
    assert_same_tensors,
    assert_same_training,
)
from benchmarks.testing.zoo import (
    ZOO,
    Case,
    Size,
)
from planner import InfeasibleBudgetError, Plan, measure, optimize


@dataclass(frozen=True)
class Subject:
    """A case with what is known about it before it is planned."""

    case: Case
    eager_bytes: int
    resident_bytes: int

    def plan_at(self, share: float, **options: Any) -> tuple[Plan, int]:
        """Plan, and the budget: share 1 is eager's peak, 0 the resident bytes.

        Where that is not feasible, it is the least budget that the error names.
        """
        budget_bytes = int(self.resident_bytes + share * (self.eager_bytes - self.resident_bytes))
        try:
            return plan_case(self.case, budget_bytes=budget_bytes, **options), budget_bytes
        except InfeasibleBudgetError as error:
            least_bytes = error.min_budget_bytes
            assert least_bytes > budget_bytes
            return plan_case(self.case, budget_bytes=least_bytes, **options), least_bytes


def plan_case(case: Case, **options: Any) -> Plan:
    """Plan a new model of the case, under its autocast."""
    with case.context():
        return optimize(case.make(), case.sample(0), loss_fn=case.loss_fn, **options)


@functools.cache
def subject(name: str, size: Size) -> Subject:
    """Measure a case, once."""
    case = ZOO[name](size)
    with case.context():
        eager = measure(case.make(), case.sample(0), loss_fn=case.loss_fn, repeats=0)
    return Subject(case, eager.peak_bytes, eager.resident_bytes)


def sizes(*fast: str, small: Collection[str] = ()) -> Callable:
    """Parametrize over the zoo, tiny, and over models of more layers.

    Fast are the named tiny ones (all without names); the rest is slow.
    """
    return pytest.mark.parametrize(
        ("name", "size"),
        [
            pytest.param(
                name,
                size,
                id=f"{name}-{size}",
                marks=()
                if size == "tiny" and (not fast or name in fast)
                else (pytest.mark.slow, pytest.mark.timeout(600)),
            )
            for size, names in (("tiny", ZOO), ("small", small))
            for name in names
        ],
    )


SMALL_AT_LEAST = ("gpt2_bf16", "transformer_encoder", "unet", "many_outputs", "lstm", "mlp_frozen")
"""Models that are tried with more layers, too, at the least budget, and those at half."""
SMALL_AT_HALF = tuple(name for name in ZOO if name not in (*SMALL_AT_LEAST, "resnet50"))


def check(name: str, size: Size, share: float) -> None:
    """Plan at a share of the activations; compare bits, then the peak with its prediction."""
    about = subject(name, size)
    case = about.case
    plan, budget_bytes = about.plan_at(share, time_limit_s=1 if size == "tiny" else 3)
    assert plan.predicted_peak_bytes <= budget_bytes
    planned = assert_same_training(
        case.build, plan.apply, case.sample, loss_fn=case.loss_fn, context=case.context
    )
    with case.context():
        peak = measure(planned, case.sample(1), loss_fn=case.loss_fn, repeats=0).peak_bytes
    assert peak <= budget_bytes
    assert peak == pytest.approx(plan.predicted_peak_bytes, rel=0.01)


@sizes(
    "gpt2",
    "lstm",
    "many_outputs",
    "mlp_bf16",
    "mlp_frozen",
    "unet",
)
def test_at_80_percent(name, size):
    """The same bits over three steps at 80 % of the activations, within the budget."""
    check(name, size, 0.8)


@sizes("mlp_bf16", small=SMALL_AT_HALF)
def test_at_50_percent(name, size):
    """The same bits over three steps at half the activations, within the budget."""
    check(name, size, 0.5)


@sizes("mlp_frozen", small=SMALL_AT_LEAST)
def test_at_the_least_feasible_budget(name, size):
    """What InfeasibleBudgetError names as the least budget works, with the same bits."""
    check(name, size, 0.0)


@sizes(small=("gpt2_bf16", "resnet50", "many_outputs", "lstm"))
def test_above_the_baseline_nothing_is_recomputed(name, size):
    """With room for all the planned step is eager's, in bytes, in operators and in bits."""
    about = subject(name, size)
    plan = plan_case(about.case, budget_bytes=2 * about.eager_bytes)
    assert not plan.schedule.recomputed()
    assert plan.overhead <= 0
    below = above = 0.01
    if about.case.autocast is not None:
        # Eager holds casts of weights for longer: in its cache until autocast ends, those too that
        # no backward pass needs; and what a backward node saved, until the node ends.
        casts = [2 * p.numel() for p in about.case.make().parameters()]
        below = 0.001 + max(casts) / about.eager_bytes
    if name == "many_outputs":
        # The engine adds up the gradients of a value with several uses in place where it may; on
        # fake tensors it does not, so that one gradient may be counted twice.
        above = 0.02
    ratio = plan.baseline_peak_bytes / about.eager_bytes
    assert 1 - below <= ratio <= 1 + above
    assert plan.predicted_peak_bytes <= plan.baseline_peak_bytes


@pytest.mark.parametrize("name", ["gpt2", "unet", "lstm", "many_outputs", "transformer_encoder"])
def test_planning_leaves_the_model_untouched(name):
    """Values, gradients, attributes and generators are the same objects with the same bits."""
    case = ZOO[name]("tiny")
    model = case.make()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    before = {f"{n}": t.clone() for n, t in model.state_dict().items()}
    attributes = [(m, dict(m.__dict__)) for m in model.modules()]
    inner = [
        (table, dict(table))
        for m in model.modules()
        for table in (m._parameters, m._buffers, m._modules)
    ]
    gradients = [p.grad for p in model.parameters()]
    generator = torch.get_rng_state()
    with case.context():
        optimize(model, case.sample(0), loss_fn=case.loss_fn, budget_gb=1, optimizer="adamw")
    assert_same_tensors(before, dict(model.state_dict()))
    for module, was in attributes:
        assert list(module.__dict__) == list(was)
        assert all(module.__dict__[key] is value for key, value in was.items())
    for table, was in inner:
        assert list(table) == list(was)
        assert all(table[key] is value for key, value in was.items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert (p.grad == 2).all()
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("name", ["unet", "bert", "lstm"])
def test_planning_twice_gives_the_same_graph(name):
    """A second capture in one process sees the same step as the first."""
    FakeTensorMode.cache_clear()
    case = ZOO[name]("tiny")
    first, second = (plan_case(case, budget_gb=1) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.graph == second.graph


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_with_its_optimizer_is_within_the_budget(optimizer):
    """State and step of the optimizer are in the prediction and in the measured peak."""
    case = ZOO["gpt2"]("tiny")
    keep = plan_case(case, budget_gb=1, optimizer=optimizer)
    resident = keep.graph.resident_bytes
    budget_bytes = int(resident + 0.7 * (keep.baseline_peak_bytes - resident))
    plan = plan_case(case, budget_bytes=budget_bytes, optimizer=optimizer, time_limit_s=1)
    model = plan.apply(case.make())
    measured = measure(model, case.sample(0), optimizer=optimizer, repeats=0)
    assert measured.resident_bytes == resident
    assert measured.peak_bytes <= budget_bytes
    assert measured.peak_bytes == pytest.approx(plan.predicted_peak_bytes, rel=0.01)
