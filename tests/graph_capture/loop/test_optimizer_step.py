"""What an optimizer holds, without a step of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graph_capture.costs.target import target_of
from tests.capturing import measure_optimizer

WEIGHT_BYTES, BIAS_BYTES = 8 * 16 * 4, 8 * 4


def _state_bytes(optimizer: Any, model: nn.Module | None = None) -> int:
    measured = measure_optimizer(optimizer, model or nn.Linear(16, 8))
    assert measured is not None
    return measured.state_bytes


def test_none_counts_none() -> None:
    """Without an optimizer there is nothing to count."""
    assert measure_optimizer(None, nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", 0),
        ("sgd_momentum", WEIGHT_BYTES + BIAS_BYTES),
        ("adam", 2 * (WEIGHT_BYTES + BIAS_BYTES) + 2 * 4),  # and a step counter each
        ("AdamW", 2 * (WEIGHT_BYTES + BIAS_BYTES) + 2 * 4),
    ],
)
def test_state_by_name(name: str, expected: int) -> None:
    """SGD holds nothing, momentum one copy, Adam two and a counter for each parameter."""
    assert _state_bytes(name) == expected


def test_adafactor_factors_matrices() -> None:
    """Adafactor holds a row and a column for a matrix, all of a vector, and counters."""
    assert _state_bytes("adafactor") == (16 + 8) * 4 + BIAS_BYTES + 2 * 4


def test_frozen_parameters_hold_no_state() -> None:
    """Only what requires grad has state."""
    model = nn.Linear(16, 8)
    model.weight.requires_grad_(False)
    assert _state_bytes("sgd_momentum", model) == BIAS_BYTES


def test_an_instance_counts_with_its_options() -> None:
    """AMSGrad holds three copies; the instance keeps its empty state and its parameters."""
    model = nn.Linear(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    before = [p.detach().clone() for p in model.parameters()]
    assert _state_bytes(optimizer, model) == 3 * (WEIGHT_BYTES + BIAS_BYTES) + 2 * 4
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"][0] is model.weight
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_instance_that_has_stepped_counts_the_same() -> None:
    """State that is there already is not counted twice."""
    model = nn.Linear(16, 8)
    optimizer = torch.optim.Adam(model.parameters())
    fresh = _state_bytes(optimizer, model)
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    assert _state_bytes(optimizer, model) == fresh


def test_an_unknown_name_is_refused() -> None:
    """An unknown name is refused with the names that are known."""
    with pytest.raises(
        ValueError,
        match=r"'adma'; did you mean 'adamax'\? one of adadelta, .*adamw",
    ):
        measure_optimizer("adma", nn.Linear(2, 2))


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    """LBFGS cannot step by itself: refused with what to do instead."""
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="leave room for its state"):
        measure_optimizer(torch.optim.LBFGS(model.parameters()), model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_on_cuda_all_parameters_are_treated_at_once() -> None:
    """There AdamW holds a temporary of all parameters, on CPU of three: one is the last one's."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    size = 64 * 64 * 4
    on_card = measure_optimizer("adamw", model, target_of(model, (), "h100"))
    on_cpu = measure_optimizer("adamw", model)
    assert on_card is not None
    assert on_cpu is not None
    assert on_card.workspace_bytes == pytest.approx(8 * size, rel=0.01)
    assert on_cpu.workspace_bytes == pytest.approx(3 * size, rel=0.01)
    assert on_card.state_bytes == 2 * 8 * size  # its counters lie in host memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_one_by_one_where_the_user_says_so() -> None:
    """``foreach=False`` is obeyed on CUDA."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    measured = measure_optimizer(optimizer, model, target_of(model, (), "h100"))
    assert measured is not None
    assert measured.workspace_bytes < 4 * 64 * 64 * 4


def test_a_wrapper_counts_as_what_it_wraps() -> None:
    """As accelerate's does: an optimizer by class alone, which PyTorch must not patch."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    model, step = nn.Linear(16, 8), Wrapper.step
    wrapped = Wrapper(torch.optim.SGD(model.parameters(), momentum=0.9))
    assert _state_bytes(wrapped, model) == WEIGHT_BYTES + BIAS_BYTES
    assert Wrapper.step is step
