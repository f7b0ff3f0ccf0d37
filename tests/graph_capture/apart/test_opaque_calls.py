"""Modules that stand for themselves: their form, and the step around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.apart.opaque_calls import BACKWARD, FORWARD, OpaqueCalls, UnknownFormError
from graph_capture.apart.opaque_form import OpaqueForm
from graph_capture.calls.autocast import AutocastState
from graph_capture.calls.call_spec import TensorSpec
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.target import target_of
from graph_capture.errors import NotFittingError
from graph_capture.step_capture import capture_step


class Inner(nn.Module):
    """A residual layer that also returns a sum that nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.linear(x).relu()
        return x + hidden, hidden.sum()


class Outer(nn.Module):
    """Something before and after the inner module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.inner(x * 2)
        return self.head(out).sum()


def _captured(
    model: nn.Module, arguments: Mapping[str, Any], forward: Callable[..., Any] | None = None
) -> CapturedStep:
    return capture_step(
        model, arguments, forward=forward or model.forward, target=target_of(model, [], None)
    )


def _form() -> OpaqueForm:
    spec = TensorSpec.of(torch.ones(3, 4, requires_grad=True))
    return OpaqueForm.of(_captured(Inner().train(), {"x": spec}))


def _rest(form: OpaqueForm | None) -> tuple[CapturedStep, OpaqueCalls]:
    model = Outer().train()
    calls = OpaqueCalls({"inner": model.inner}, lambda *_call: form, "cpu")

    x = torch.ones(3, 4, requires_grad=True)
    try:
        return _captured(model, {"x": x}, calls.around(model.forward)), calls
    finally:
        calls.forget()


def test_the_form_of_a_call_is_its_tensors() -> None:
    """Two outputs, gradients of the argument and of two parameters."""
    form = _form()
    assert [tensor.spec.shape for tensor in form.outputs] == [(3, 4), ()]
    assert sorted(map(str, form.leaves)) == ["0", "linear.bias", "linear.weight"]


def test_a_residual_layer_adds_up_its_arguments_gradient() -> None:
    """The skip connection and the layer both contribute; the parameters' gradients are no sums."""
    form = _form()
    assert [form.leaves[i] for i in form.summed] == [0]


def test_a_call_is_one_operator_each_way() -> None:
    """None of its own operators is in the rest of the step."""
    rest, calls = _rest(_form())
    targets = [op.target for op in rest.graph.operators]
    assert (targets.count(FORWARD), targets.count(BACKWARD)) == (1, 1)
    assert not any("relu" in target for target in targets)
    assert [call.path for call in calls.seen] == ["inner"]


def test_outputs_without_a_gradient_are_noted() -> None:
    """The sum has no part in the loss."""
    _, calls = _rest(_form())
    assert calls.without_gradient == {0: {1}}


def test_an_unknown_call_ends_the_capture() -> None:
    """With the call that has to be captured first."""
    with pytest.raises(UnknownFormError) as caught:
        _rest(None)
    assert caught.value.path == "inner"
    assert caught.value.arguments["x"].shape == (3, 4)


class Counting(nn.Module):
    """Puts another tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.linear(x)


def test_a_module_that_replaces_its_buffer_cannot_stand_apart() -> None:
    """A later call would read it."""
    spec = TensorSpec.of(torch.ones(3, 4))
    captured = _captured(Counting().train(), {"x": spec})
    with pytest.raises(NotFittingError, match="replaces 'count'"):
        OpaqueForm.of(captured)


def test_a_call_is_asked_for_under_its_autocast() -> None:
    """The one that it is made under, not the one that the model is."""
    model = Outer().train()
    seen = []

    def form_of(
        _path: str, _arguments: Mapping[str, Any], autocast: AutocastState, values: object
    ) -> None:
        assert values is None  # on stand-ins
        seen.append((autocast.dtype, autocast.caches))

    calls = OpaqueCalls({"inner": model.inner}, form_of, "cpu")
    for caches in (True, False):
        region = torch.autocast("cpu", torch.float16, cache_enabled=caches)
        with calls.standing_in(), region, pytest.raises(UnknownFormError):
            model.inner(torch.ones(3, 4))
    with calls.standing_in(), pytest.raises(UnknownFormError):
        model.inner(torch.ones(3, 4))
    assert seen == [(torch.float16, True), (torch.float16, False), (None, True)]
