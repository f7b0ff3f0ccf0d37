"""PyTorch's settings that choose kernels, changed after planning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import Plan, PlanMismatchError, PlanWarning, optimize
from tests.planner.small import make, square


def convolutions() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)), nn.Flatten())


@contextmanager
def onednn_off() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return optimize(make(convolutions), pictures(), budget="100%", loss_fn=square)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    square(model(pictures(1))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_kernels_with_other_scratch_are_said_in_the_loop(plan: Plan) -> None:
    """Without oneDNN a convolution unfolds its input: eager's bits, and one warning."""
    model = plan.apply(make(convolutions))
    assert_same_tensors(gradients(make(convolutions)), gradients(model))
    with onednn_off():
        with pytest.warns(PlanWarning, match=r"settings \(oneDNN\) have changed.*scratch"):
            found = gradients(model)
        assert_same_tensors(gradients(make(convolutions)), found)
    gradients(model)


def test_scratch_is_measured_again_where_a_plan_is_applied(plan: Plan) -> None:
    """Under other settings than the plan's the peak is known before a step, and refused."""
    with (
        onednn_off(),
        pytest.raises(PlanMismatchError, match=r"peaks at .* bytes of scratch here"),
    ):
        plan.apply(make(convolutions))


def test_more_threads_are_said(plan: Plan) -> None:
    """Each has scratch memory of its own."""
    before = torch.get_num_threads()
    model = plan.apply(make(convolutions))
    gradients(model)
    torch.set_num_threads(before + 1)
    try:
        with pytest.warns(PlanWarning, match=r"\(number of threads\) have changed"):
            gradients(model)
    finally:
        torch.set_num_threads(before)
