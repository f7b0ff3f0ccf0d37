"""accelerate's wrappers around a planned model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planner
from planner import applied_plan
from tests.planner.integrations.loops import Trained, assert_same, trained
from tests.planner.small import make, plan_for, sample, square

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate keeps its first precision for the whole process."""
    yield
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(reset_partial_state=True)


def run(
    how: str | None, *, precision: str = "no", folder: Path | None = None, resume: bool = False
) -> Trained:
    """Twenty steps of two micro-batches; ``how`` says when and by what the model is planned."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    own = model

    def plan(optimizer: torch.optim.Optimizer) -> None:
        options: Any = {"loss_fn": square, "optimizer": optimizer, "grads": "accumulated"}
        if how is not None and "watch" in how:
            planner.watch(own, budget="80%", **options)
        else:
            plan_for(own, sample(), share=0.8, **options).apply(own)

    if how is not None and "before" in how:
        plan(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if how is not None and "after" in how:
        plan(optimizer)

    def train() -> list[Any]:
        torch.manual_seed(1)
        losses = []
        for i in range(40):
            if resume and i < 20:
                continue
            if resume and i == 20:
                accelerator.load_state(str(folder))
            with accelerator.accumulate(model):
                loss = square(model(sample(i)))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if folder is not None and not resume and i == 19:
                accelerator.save_state(str(folder))
        return losses

    found = trained(own, train)
    if how is not None:
        applied = applied_plan(own)
        assert (applied.planned_steps, applied.unplanned_steps) == (len(found.losses), 0)
        assert applied.peak_bytes <= applied.plan.budget_bytes
        assert applied.plan.schedule.recomputed()
    return found


@pytest.mark.parametrize(
    ("how", "precision"),
    [
        ("watch before", "no"),
        ("watch before", "bf16"),
        ("watch after", "bf16"),
        ("plan before", "no"),  # prepare() adds an autocast, under which a plan has to be made
        ("plan after", "bf16"),
    ],
)
def test_prepare_and_accumulate(how: str, precision: str) -> None:
    """Planned before prepare() or after it: eager's losses and weights, every call by the plan."""
    assert_same(run(None, precision=precision), run(how, precision=precision))


@pytest.mark.parametrize("how", ["watch before", "watch after"])
def test_state_is_saved_and_loaded(how: str, tmp_path: Path) -> None:
    """A planned training resumes in the middle."""
    whole = run(None)
    saved = run(how, folder=tmp_path)
    resumed = run(how, folder=tmp_path, resume=True)
    assert_same(whole, saved)
    assert whole.losses[20:] == resumed.losses
    for name, tensor in whole.state.items():
        assert torch.equal(tensor, resumed.state[name]), name


def test_the_wrapper_is_taken_off() -> None:
    """unwrap_model binds what is behind the autocast; the plan goes on and can be removed."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    own = make()
    planner.watch(own, budget_gb=1, loss_fn=square)
    model = accelerator.prepare(own)
    square(model(sample())).backward()
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with torch.autocast("cpu", torch.bfloat16):
        bare(sample())
        bare.eval()(sample())
    assert applied_plan(own).planned_steps == 2
    planner.Plan.remove(own)
    assert isinstance(bare.train()(sample()), torch.Tensor)
    assert isinstance(own, nn.Module)
