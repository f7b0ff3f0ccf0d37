"""Training loops that change what forward or backward reads beside arguments and parameters."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import PlanMismatchError, PlanWarning, applied_plan, optimize
from tests.planner.small import make, sample, square


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned round by a factor that forward was given."""

    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * -ctx.alpha * Reversal.factor, None


class Config:
    gain = 1.0


class Reads(nn.Module):
    """Reads numbers from wherever models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.dropout, self.norm = nn.Dropout(0.1), nn.BatchNorm1d(32)
        self.alpha, self.tau, self.config, self.offsets = 1.0, 5.0, Config(), [3]
        self.act, self.merged = F.gelu, False
        self.beta = torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.act(self.first(x))) * self.config.gain * self.beta
        if not self.merged:
            h = h + self.second(x)
        h = Reversal.apply(self.norm(h), self.alpha) / self.tau
        return h * (torch.arange(32) >= self.offsets[0])


def set_to(path: str, value: Any) -> Any:
    def change(model: nn.Module) -> None:
        owner: Any = model
        *parts, last = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return change


NUMBERS = {
    "dropout.p": 0.5,
    "norm.momentum": 0.5,
    "norm.eps": 0.1,
    "alpha": 0.3,
    "tau": 0.5,
    "config.gain": 2.0,
    "offsets": [20],
}
STEPS = {"act": F.silu, "merged": True}


def step(model: nn.Module, i: int) -> dict[str, Any]:
    torch.manual_seed(i)
    model.zero_grad()
    loss = square(model(sample(i)))
    loss.backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return {"loss": loss.detach(), **gradients, **buffers, "generator": torch.get_rng_state()}


def planned(policy: str = "error") -> nn.Module:
    plan = optimize(make(Reads), sample(), budget_gb=1, loss_fn=square)
    return plan.apply(make(Reads), on_shape_change=policy)


@pytest.mark.parametrize("path", NUMBERS)
def test_another_number(path):
    """The step is captured again and runs by the same plan; back again, too."""
    eager, model = make(Reads), planned()
    for i, value in enumerate((None, NUMBERS[path], None)):
        for m in (eager, model):
            if i == 1:
                set_to(path, value)(m)
            elif i == 2:
                set_to(path, _first_value(path))(m)
        assert_same_tensors(step(eager, i), step(model, i))
    assert applied_plan(model).planned_steps == 3


def _first_value(path: str) -> Any:
    owner: Any = make(Reads)
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.parametrize("policy", ["error", "unplanned", "replan"])
def test_another_step(path, policy):
    """What makes another step of it is an error that names it, or runs as eager does."""
    eager, model = make(Reads), planned(policy)
    assert_same_tensors(step(eager, 0), step(model, 0))
    for m in (eager, model):
        set_to(path, STEPS[path])(m)
    if policy == "error":
        with pytest.raises(PlanMismatchError, match=f"attribute '{path}' is"):
            step(model, 1)
    elif policy == "unplanned":
        expected = step(eager, 1)
        with pytest.warns(PlanWarning, match=f"attribute '{path}' is"):
            found = step(model, 1)
        assert_same_tensors(expected, found)
    else:
        assert_same_tensors(step(eager, 1), step(model, 1))


def test_a_plain_tensor_attribute():
    """Replaced or written to, the next step uses what is there."""
    eager, model = make(Reads), planned()
    step(model, 0)
    step(eager, 0)
    for change in (lambda m: m.beta.fill_(2.0), set_to("beta", torch.tensor(3.0))):
        change(eager)
        change(model)
        assert_same_tensors(step(eager, 1), step(model, 1))


def test_a_class_attribute_that_backward_reads(monkeypatch):
    """A factor on the Function's class."""
    eager, model = make(Reads), planned()
    step(model, 0)
    step(eager, 0)
    monkeypatch.setattr(Reversal, "factor", 3.0)
    assert_same_tensors(step(eager, 1), step(model, 1))


def test_a_number_that_changes_in_every_step_is_right_and_said_to_cost_captures():
    """A schedule of the dropout rate: eager's bits, and one warning about the captures."""
    eager, model = make(Reads), planned()
    for i in range(2):
        for m in (eager, model):
            m.dropout.p = 0.1 + 0.1 * i
        assert_same_tensors(step(eager, i), step(model, i))
    with pytest.warns(PlanWarning, match=r"captured again 3 times.*dropout\.p"):  # noqa: PT031
        for i in range(2, 5):
            for m in (eager, model):
                m.dropout.p = 0.1 + 0.1 * i
            assert_same_tensors(step(eager, i), step(model, i))


def test_what_forward_does_not_read_may_change(monkeypatch):
    """Counters of the loop on the module cost no capture."""
    from planner.running import planned_call

    model = planned()
    step(model, 0)
    monkeypatch.setattr(planned_call, "capture_for", None)
    model.global_step, model.config.note = 1, "another"
    step(model, 1)


class Masked(nn.Module):
    """Asks for a value that follows from a mask, which is computed while a step is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(64)
        mask = (i[:, None] - i).clamp(0, 1) * 1.5
        if mask.sum() < 0:
            raise ValueError
        return self.layers(x * mask.mean()) * self.scale


def test_a_step_that_was_captured_again_runs_without_what_the_capture_computed() -> None:
    """Cycles of a capture hold it, beside the budget, until somebody collects them."""
    model, x = Masked().train(), torch.ones(8, 16)
    optimize(model, x, budget_gb=1, loss_fn=square, time_limit_s=1).apply(model)
    square(model(x)).backward()
    model.scale = 2.0
    gc.collect()
    gc.disable()
    try:
        output = model(x)
        masks = [t for t in gc.get_objects() if type(t) is Tensor and tuple(t.shape) == (64, 64)]
    finally:
        gc.enable()
    square(output).backward()
    assert applied_plan(model).planned_steps == 2
    assert not masks
