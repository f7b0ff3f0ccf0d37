"""Steps that run for real: how long each memory lives, and what is put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graph_capture.apart.real_calls import RealCalls
from graph_capture.apart.real_step import Ending, RealStep, real_step
from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.costs.target import target_of
from graph_capture.errors import CaptureError
from graph_capture.loop.loop_holds import NOTHING_ELSE
from graph_capture.private_torch.tensors import version_of
from solvers.replay import replay
from solvers.schedule import Schedule

Step = Callable[[Tensor, Callable[[Tensor], None]], object]


def _recorded(step: Step, x: Tensor) -> RealStep:
    calls = RealCalls("cpu")
    calls.there(x, "x", "input")
    with calls:
        held = step(x, lambda loss: calls.turn("output", [loss]))
    calls.end()
    nothing: frozenset[int] = frozenset()
    del held
    return real_step(
        calls,
        Ending(gradients=nothing, outputs=nothing, left=nothing),
        target=target_of(torch.nn.Module(), [x]),
        cost_model="roofline",
        optimizer=None,
        holds=NOTHING_ELSE,
    )


def _plain(x: Tensor, turn: Callable[[Tensor], None]) -> object:
    loss = x.exp().sin().sum()
    turn(loss)
    return torch.autograd.grad(loss, x)


def _held_in_python(x: Tensor, turn: Callable[[Tensor], None]) -> object:
    first = x.detach().exp()
    later = [first * 2]
    loss = (x * 1.5).sin().sum()
    later.clear()
    turn(loss)
    gradient = torch.autograd.grad(loss, x)
    del first
    return gradient


def _in_place(x: Tensor, turn: Callable[[Tensor], None]) -> object:
    out = x.sin().mul_(2).add_(1)
    out[:2] = 0
    loss = out.view(-1).sum()
    turn(loss)
    return torch.autograd.grad(loss, x)


def _by_values(x: Tensor, turn: Callable[[Tensor], None]) -> object:
    rows = x[x[:, 0] > 0]
    where = (x > 1).nonzero()
    loss = rows.exp().sum() * (2.0 if where.numel() > 4 else 1.0)
    if rows.mean().item() > 0:
        loss = loss + rows.cos().sum()
    turn(loss)
    return torch.autograd.grad(loss, x)


def _resized(x: Tensor, turn: Callable[[Tensor], None]) -> object:
    out = torch.empty(0)
    torch.mul(x.detach(), 2, out=out)
    loss = (x * out).sum()
    turn(loss)
    return torch.autograd.grad(loss, x)


@pytest.mark.parametrize("step", [_plain, _held_in_python, _in_place, _by_values, _resized])
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_the_peak_is_what_the_allocator_records(step: Step) -> None:
    """To a few numbers, and never less."""
    x = torch.linspace(-3, 3, 4000).view(500, 8).requires_grad_()
    recorded = _recorded(step, x)
    graph = recorded.graph
    outcome = replay(graph, Schedule.keep_all(graph))
    found = outcome.peak_bytes - graph.resident_bytes
    numbers = sum(s.size_bytes for s in graph.storages if s.name == "numbers that autograd saves")
    measured = peak_extra_bytes(lambda: step(x, lambda _loss: None))
    assert measured <= found + numbers
    assert found <= measured


def test_what_was_there_is_put_back() -> None:
    """Also what is written to while nothing is written down; the step's own memory is not."""
    before, apart, own = torch.ones(3), torch.ones(3), []
    calls = RealCalls("cpu")
    for i, tensor in enumerate((before, apart)):
        calls.there(tensor, f"buffer {i}", "buffer")
    with calls.undoing(), calls:
        before.add_(1)
        own.append(before + 1)
        own[0].add_(1)
        with calls.apart():
            apart.mul_(5)
        assert apart.tolist() == [5.0, 5.0, 5.0]
    assert before.tolist() == apart.tolist() == [1.0, 1.0, 1.0]
    assert own[0].tolist() == [4.0, 4.0, 4.0]


def test_what_is_not_written_to_is_not_touched() -> None:
    """Its version stays."""
    x = torch.ones(3)
    calls = RealCalls("cpu")
    calls.there(x, "buffer", "buffer")
    with calls.undoing(), calls:
        x.sum()
    assert version_of(x) == 0


def test_a_sparse_tensor_is_refused() -> None:
    """It has no memory of its own, and the error names the line."""
    with (
        pytest.raises(CaptureError, match=r"sparse_coo \(test_real_step.py:\d+\)"),
        RealCalls("cpu"),
    ):
        torch.eye(3).to_sparse()
