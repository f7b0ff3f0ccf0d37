"""What a loop holds, as a value and in the cost graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graph_capture.cost_graph import CostGraph
from graph_capture.loop.loop_holds import NOTHING_ELSE, LoopHolds
from graph_capture.loop.optimizer_step import OptimizerStep
from graph_capture.step_capture import capture
from solvers.replay import replay
from solvers.schedule import Schedule


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("kept", "none", 0), "outputs is 'held' or 'released', got 'kept'"),
        ((None, "none", 0), "outputs is 'held' or 'released'"),
        (("held", "zero", 0), "grads is 'none' or "),
        (("held", "acumulated", 0), "got 'acumulated'; did you mean 'accumulated'"),
        (("held", "none", -1), "resident_bytes is a number of bytes from 0 on"),
        (("held", "none", 1.5), "resident_bytes is a number of bytes from 0 on"),
        (("held", "none", True), "resident_bytes is a number of bytes from 0 on"),
        (("held", "none", "a lot"), "resident_bytes='a lot': not an amount of memory"),
        (("held", "none", 2**63), "resident_bytes is at most"),
    ],
)
def test_words_that_are_none_are_refused(words: tuple, named: str) -> None:
    """The message names the argument and what it takes."""
    with pytest.raises(ValueError, match=named):
        LoopHolds.of(*words)


def test_a_loop_that_holds_nothing_else_has_nothing_to_say() -> None:
    """The defaults are what a loop did before there were words for it."""
    assert LoopHolds.of("held", "none", "0") == NOTHING_ELSE
    assert NOTHING_ELSE.words == ()


class Head(nn.Module):
    """A wide output behind a narrow layer."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.narrow(x)))


OUTPUT_BYTES = 64 * 1000 * 4


def _graph(loss_fn, kind: type[nn.Module] = Head, **words) -> CostGraph:
    model, sample = kind().train(), torch.zeros(64, 16)
    return capture(model, sample, loss_fn=loss_fn, holds=LoopHolds(**words))


def _memory(graph: CostGraph) -> list[int]:
    return list(replay(graph, Schedule.keep_all(graph)).memory_bytes)


def _log_softmax(output: Tensor) -> Tensor:
    return output.log_softmax(-1).mean()


def test_released_outputs_are_gone_after_the_loss() -> None:
    """In each run of the backward pass there is one output less."""
    held, released = (_graph(_log_softmax, outputs=o) for o in ("held", "released"))
    turn = next(v for v, op in enumerate(held.operators) if op.phase == "loss")
    less = [a - b for a, b in zip(_memory(held), _memory(released), strict=True)]
    assert less[:turn] == [0] * turn
    assert less[turn:] == [OUTPUT_BYTES] * (len(less) - turn)


def test_a_loss_that_keeps_the_output_for_its_gradient_does_not_release_it() -> None:
    """The squares need what was squared: the loss needs no less."""
    held, released = (_graph(lambda y: y.square().mean(), outputs=o) for o in ("held", "released"))
    turn = next(v for v, op in enumerate(held.operators) if op.phase == "loss")
    assert _memory(released)[turn] == _memory(held)[turn]
    assert _memory(released)[turn + 1] == _memory(held)[turn + 1] - OUTPUT_BYTES


class Returned(Head):
    """Outputs that are a parameter, an input and a view of another."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = super().forward(x)
        return y, y[:, :10], self.wide.weight, x


def test_what_lies_elsewhere_is_not_released() -> None:
    """Parameters and inputs stay, and views are gone with what they look at."""
    graphs = [
        _graph(lambda y: _log_softmax(y[0]), Returned, outputs=o) for o in ("held", "released")
    ]
    held, released = (_memory(graph)[-1] for graph in graphs)
    assert held - released == OUTPUT_BYTES


def test_outputs_that_the_loop_differentiates_are_held() -> None:
    """Without a loss they are arguments of the backward pass."""
    assert _graph(None, outputs="released") == _graph(None)


class Passed(torch.autograd.Function):
    """Its gradient is the very output that it saved."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def test_a_gradient_that_lies_in_an_output_keeps_it() -> None:
    """The output is there until the backward pass has used it as a gradient."""
    graph = _graph(Passed.apply, outputs="released")
    (output,) = (k for k, s in enumerate(graph.storages) if s.category == "output" and not s.kept)
    assert {graph.operators[v].phase for v in graph.consumers[output]} == {"loss", "backward"}


def test_accumulated_gradients_are_there_and_new_ones_go() -> None:
    """Earlier gradients all the while; new ones until they are added, not when weights change."""
    gradient_bytes = sum(p.numel() * 4 for p in Head().parameters())
    none, accumulated = (
        capture(
            Head().train(),
            torch.zeros(64, 16),
            loss_fn=_log_softmax,
            optimizer=OptimizerStep(name="none", state_bytes=0, workspace_bytes=0),
            holds=LoopHolds(grads=grads),
        )
        for grads in ("none", "accumulated")
    )
    without, memory = _memory(none), _memory(accumulated)
    assert accumulated.resident_bytes == none.resident_bytes + gradient_bytes
    assert memory[-2] == without[-1] + gradient_bytes  # where new ones are added to earlier ones
    assert memory[-1] == without[-1]  # the optimizer has one set, as ever


def test_residents_are_there_all_the_while() -> None:
    """So many bytes more at each moment, in a category of their own."""
    plain, more = (_graph(_log_softmax, resident_bytes=n) for n in (0, 12345))
    assert [b - a for a, b in zip(_memory(plain), _memory(more), strict=True)] == [12345] * len(
        _memory(plain)
    )
    assert [s.size_bytes for s in more.storages if s.category == "resident"] == [12345]
    assert more.fingerprint == plain.fingerprint


@pytest.mark.parametrize("loss_fn", [_log_softmax, lambda y: y.square().mean()])
def test_a_released_loss_is_the_same_for_a_device_that_is_absent(loss_fn) -> None:
    """The walk in the engine's place asks for gradients of outputs that nobody holds, too."""
    here, there = (
        capture(
            Head().train(),
            torch.zeros(64, 16),
            loss_fn=loss_fn,
            device=device,
            holds=LoopHolds(outputs="released"),
        )
        for device in ("cpu", "h100")
    )
    scratch = [
        next(op.workspace_bytes for op in graph.operators if op.phase == "loss")
        for graph in (here, there)
    ]
    assert scratch[1] == scratch[0]
