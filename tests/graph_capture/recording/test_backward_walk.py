"""The walk over an autograd graph does what PyTorch's engine does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.testing.zoo import (
    Case,
    cases,
)
from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.target import Target
from graph_capture.errors import NotFittingError
from graph_capture.recording.backward_walk import BackwardWalk, Engine, hooks_refused
from tests.capturing import capture_step

from ..odd import ODD, WIDTH, Three, mean_square, normal, sample

VARIED = ("gpt2_bf16", "resnet50", "unet", "many_outputs", "lstm", "mixture_of_experts")
"""Autocast, statistics, branches, several outputs, recurrence, routing."""
LARGER = ("t5",)
"""Two stacks: slow, since they take longest."""


def _capture(model: nn.Module, sample_input: Any, loss: Any = mean_square) -> CapturedStep:
    args, kwargs = split_sample(sample_input)
    arguments = bind_call(model.forward, args, kwargs)
    return capture_step(model, arguments, loss=loss, measure_scratch=False)


def _operators(captured: CapturedStep) -> list[tuple[str, str, str]]:
    return [(op.target, op.module_path, op.source) for op in captured.graph.operators]


def _both_engines(
    monkeypatch: pytest.MonkeyPatch, capture: Callable[[], CapturedStep]
) -> tuple[CapturedStep, CapturedStep]:
    by_engine = capture()
    monkeypatch.setattr(Target, "absent", property(lambda _self: True))
    return by_engine, capture()


def _assert_same(by_engine: CapturedStep, by_walk: CapturedStep) -> None:
    assert _operators(by_engine) == _operators(by_walk)
    assert by_engine.graph.fingerprint == by_walk.graph.fingerprint
    assert by_engine.step.loss_spec == by_walk.step.loss_spec


@pytest.mark.parametrize(
    "case",
    [
        *cases("tiny", *VARIED),
        *(
            pytest.param(*case.values, id=case.id, marks=(*case.marks, pytest.mark.slow))
            for case in cases("tiny", *LARGER)
        ),
    ],
)
def test_models_are_captured_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, module paths, lines, wiring and the loss's memory are the same by walk and engine."""
    model = case.make()

    def capture() -> CapturedStep:
        with case.context():
            return _capture(model, case.sample(0), case.loss_fn)

    _assert_same(*_both_engines(monkeypatch, capture))


@pytest.mark.parametrize("name", ODD)
def test_odd_modules_are_captured_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are modules that do unusual things."""
    model = ODD[name]()
    _assert_same(*_both_engines(monkeypatch, lambda: _capture(model, sample(name)(0))))


# -- what the engine does around nodes -----------------------------------------------------


class _Pair(torch.autograd.Function):
    """Two outputs, arguments that are no tensors, a gradient too many."""

    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor, constant: Tensor, note: str) -> Any:
        ctx.factor = factor
        return x * factor, x + constant

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        assert first is not None
        assert second is not None
        return None, first * ctx.factor + second, None, None, None


class _WithoutZeros(torch.autograd.Function):
    """Takes None for the gradient that is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Any:
        assert second is None
        assert first is not None
        return first * 2


class _Roundabout(torch.autograd.Function):
    """Hands back a gradient of another dtype and of a broadcast shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> Tensor:
        return x + row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.double(), grad


class _OneOfTwo(Three):
    def forward(self, x: Tensor) -> Tensor:
        first, _second = _Pair.apply(0.5, self.a(x), torch.ones(WIDTH), "note")
        return self.b(first)


class _Unread(Three):
    def forward(self, x: Tensor) -> Tensor:
        first, _second = _WithoutZeros.apply(self.a(x))
        return self.b(first)


class _Converted(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(_Roundabout.apply(self.a(x), self.c.bias))


class _Shared(Three):
    """One weight read three times, one of them transposed; broadcast and expanded inputs."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(F.linear(self.a(x), self.a.weight), self.a.weight.t())
        scale = self.b.bias[:1].expand(h.shape[0], 1)
        return (h * scale + self.c.bias).unflatten(1, (4, -1)).transpose(0, 1).flatten(1)


class _SplitAndWritten(Three):
    """Outputs of a split in another order, one unused; in-place calls on views."""

    def forward(self, x: Tensor) -> Tensor:
        one, _two, three, four = self.a(x).split(WIDTH // 4, dim=1)
        h = torch.cat([four, one.clone().mul_(2), three], dim=1).contiguous()
        h[:, 1:3].add_(1.5)
        h[:, :4] *= 3
        return F.linear(h, self.b.weight[:, : h.shape[1]])


class _GradInside(Three):
    """A tensor made in forward asks for a gradient of its own; half of the layers are frozen."""

    def prepare(self) -> None:
        self.a.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).requires_grad_()
        return self.c(F.gelu(self.b(h))) + h.detach()


class _Branches(Three):
    """Two branches of different length that meet again, and one that is cut."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        long = self.b(torch.tanh(self.b(h)))
        with torch.no_grad():
            h = h + self.c(h)
        return long + h, (long * h).sum(dim=1)


@pytest.mark.parametrize(
    "model",
    [_OneOfTwo, _Unread, _Converted, _Shared, _SplitAndWritten, _GradInside, _Branches],
    ids=lambda model: model.__name__,
)
@pytest.mark.parametrize("loss", [mean_square, None], ids=["loss", "all outputs"])
def test_rules_of_the_engine(
    model: type[Three], loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing gradients, casts, reductions, sums of several, and what is not asked for."""
    made = model()
    _assert_same(*_both_engines(monkeypatch, lambda: _capture(made, normal(0, 16, WIDTH), loss)))


def _leaves() -> tuple[list[Tensor], list[Tensor]]:
    x, y, unused = (normal(i, 3, 4).requires_grad_() for i in range(3))
    h = torch.sin(x) * y
    return [h.sum(), (h * h).mean() + y.sum()], [x, y, unused, h]


def test_gradients_have_the_same_bits() -> None:
    """On real tensors, with several outputs, leaves and a value in the middle."""
    outputs, inputs = _leaves()
    expected = Engine().grad(list(outputs), inputs)
    outputs, inputs = _leaves()
    found = BackwardWalk().grad(list(outputs), inputs)
    assert expected[2] is None
    assert found[2] is None
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)  # type: ignore[arg-type]


def test_a_walk_can_be_walked_again() -> None:
    """With ``create_graph`` second derivatives come out: d2(x^3)/dx2 = 6x."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (first,) = BackwardWalk().grad([(x**3).sum()], [x], create_graph=True)
    assert first is not None
    (second,) = BackwardWalk().grad([first.sum()], [x])
    assert second is not None
    assert torch.equal(second, 6 * x)


def test_what_outputs_hold_is_let_go() -> None:
    """The list is emptied, as a loop that keeps no loss would free it."""
    outputs, inputs = _leaves()
    BackwardWalk().grad(outputs, inputs)
    assert outputs == []


class _Hooked(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.register_hook(lambda g: g * 2)
        return self.b(h)


def test_hooks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on a tensor or a module would be missed, so it is an error that names it."""
    monkeypatch.setattr(Target, "absent", property(lambda _self: True))
    with pytest.raises(NotFittingError, match=r"Tensor\.register_hook"):
        _capture(_Hooked(), normal(0, 16, WIDTH))
    model = Three()
    model.b.register_full_backward_hook(lambda *_args: None)
    with pytest.raises(NotFittingError, match="module 'b' has backward hooks"):
        _capture(model, normal(0, 16, WIDTH))


def test_hooks_work_again_afterwards() -> None:
    """Only while tracing are hooks refused."""
    with hooks_refused():
        pass
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: g * 3)
    x.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]
