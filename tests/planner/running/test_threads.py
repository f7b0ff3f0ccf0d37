"""Threads that train one planned module, while its steps are captured."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from planner import PlanWarning, applied_plan, optimize


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.last = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x)) + x
        return self.last(x)


def _gradients(
    model: nn.Module, parameters: list[nn.Parameter], x: torch.Tensor
) -> list[torch.Tensor]:
    """Of the parameters, without accumulating them in the module that threads share."""
    return list(torch.autograd.grad(model(x).sum(), parameters))


def _in_threads(*functions: Callable[[], None]) -> list[BaseException]:
    with ThreadPoolExecutor(len(functions)) as threads:
        calls = [threads.submit(function) for function in functions]
    return [error for call in calls if (error := call.exception()) is not None]


@pytest.mark.filterwarnings("ignore:a planned model is called again")  # in another thread
def test_a_thread_trains_while_another_adapts_the_same_module() -> None:
    """Captures put stand-ins into the module; no step sees them, and all bits are eager's."""
    torch.manual_seed(1)
    batch, own = torch.randn(32, 16), _Net()
    sizes = range(2, 5)
    theirs = list(own.parameters())
    expected = {n: _gradients(own, theirs, batch[:n].clone()) for n in (*sizes, 32)}
    planned = _Net()
    parameters = list(planned.parameters())
    optimize(planned, batch, budget="85%", shapes="sample").apply(planned)
    done = threading.Event()
    wrong: list[int] = []

    def compare(n: int) -> None:
        found = _gradients(planned, parameters, batch[:n].clone())
        if not all(map(torch.equal, found, expected[n])):
            wrong.append(n)

    def adapt() -> None:
        try:
            for n in sizes:
                compare(n)
        finally:
            done.set()

    def train() -> None:
        while not done.wait(0.01):
            compare(32)

    assert _in_threads(adapt, train) == []
    assert wrong == []
    applied = applied_plan(planned)
    assert applied is not None
    assert applied.captures == len(sizes)
    assert isinstance(planned.last.weight, nn.Parameter)


def test_backward_passes_in_several_threads_are_told_apart() -> None:
    """One thread's gradient does not look like a step that no plan ran."""
    planned, batch, both = _Net(), torch.randn(8, 16), threading.Barrier(2, timeout=30)
    for parameter in planned.parameters():
        parameter.register_hook(lambda _gradient: (both.wait(), None)[1])
    optimize(planned, batch, budget="90%").apply(planned)
    first = planned(batch).sum()
    with pytest.warns(PlanWarning, match="called again before the backward pass"):
        second = planned(batch).sum()
    assert _in_threads(first.backward, second.backward) == []
    applied = applied_plan(planned)
    assert applied is not None
    assert (applied.planned_steps, applied.unplanned_steps) == (2, 0)
