"""One training step as one graph."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.calls.call_spec import bind_call
from graph_capture.errors import CaptureError
from graph_capture.tracing.traced_step import TracedStep
from tests.capturing import trace_step

from ..odd import BufferDataReplaced, BufferReplaced, Three, mean_square, normal


def _trace(model: nn.Module, *args: Any, loss: Any = None) -> TracedStep:
    return trace_step(model, bind_call(model.forward, args, {}), loss)


def _targets(step: TracedStep, phase: str) -> list[str]:
    return [str(n.target) for n in step.graph.nodes if n.meta.get("phase") == phase]


def test_the_calls_are_those_of_eager() -> None:
    """A linear layer and a ReLU: one product forward, mask, product and sum backward."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    step = _trace(model, torch.zeros(4, 3), loss=torch.sum)
    assert "aten.addmm.default" in _targets(step, "forward")
    assert "aten.relu.default" in _targets(step, "forward")
    backward = _targets(step, "backward")
    assert backward.count("aten.threshold_backward.default") == 1
    assert backward.count("aten.mm.default") == 1
    assert backward.count("aten.sum.dim_IntList") == 1


def test_the_model_is_left_as_it_was() -> None:
    """Parameters are the same objects, their values, gradients and flags untouched."""
    model = Three()
    parameters = list(model.parameters())
    values = copy.deepcopy(model.state_dict())
    _trace(model, normal(0, 16, 32), loss=mean_square)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in parameters)


def test_the_generator_is_left_as_it_was() -> None:
    """Tracing a dropout draws nothing."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    before = torch.get_rng_state()
    _trace(model, torch.zeros(2, 4), loss=torch.sum)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_input_is_left_as_it_was() -> None:
    """Forward that writes to its input writes to a stand-in while traced."""

    class Writes(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.mul_(2))

    x = torch.ones(16, 32)
    _trace(Writes(), x, loss=mean_square)
    assert torch.equal(x, torch.ones(16, 32))


def test_what_is_differentiated() -> None:
    """The scalar output, output.loss, what loss_fn uses, or all that requires grad."""
    model = Three()
    x = normal(0, 16, 32)
    three = lambda: [model.a(x), model.b(x).detach(), model.c(x)]  # noqa: E731
    cases: list[tuple[Any, Any, tuple[int, ...], str]] = [
        (lambda: model.a(x).sum(), None, (0,), "output"),
        (lambda: SimpleNamespace(y=x, loss=model.b(x).sum()), None, (0,), "output.loss"),
        (three, lambda out: out[2].sum(), (2,), "loss_fn"),
        (three, None, (0, 2), "outputs"),
    ]
    for forward, loss, differentiated, label in cases:
        step = trace_step(model, {}, loss, forward=forward)
        assert (step.differentiated, step.loss.source) == (differentiated, label)


def test_outputs_that_come_back_detached_are_known() -> None:
    """Beside a loss, other outputs that require grad are listed as detached."""
    model = Three()
    x = normal(0, 16, 32)
    step = trace_step(
        model, {}, forward=lambda: SimpleNamespace(loss=model.a(x).sum(), logits=model.b(x))
    )
    assert len(step.detached) == 1
    assert step.detached[0] not in step.differentiated


def test_shared_gradients_are_copied() -> None:
    """Two biases whose gradients are one tensor get one each, as AccumulateGrad does."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(8))
            self.q = nn.Parameter(torch.zeros(8))

        def forward(self) -> Tensor:
            return self.p + self.q

    step = _trace(Shared())
    memory = {g.meta["val"].untyped_storage()._cdata for _, g in step.gradients}
    assert len(step.gradients) == len(memory) == 2


def test_frozen_and_unused_parameters_get_no_gradient() -> None:
    """Only parameters that require grad and take part are among the gradients."""
    model = Three()
    model.a.requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    step = _trace(model, normal(0, 16, 32), loss=mean_square)
    assert {n.meta["target"] for n, _ in step.gradients} == {
        "b.weight",
        "b.bias",
        "c.weight",
        "c.bias",
    }


def test_tied_weights_are_one_placeholder() -> None:
    """A parameter with two names is one input with both."""
    model = Three()
    model.b.weight = model.a.weight
    step = _trace(model, normal(0, 16, 32), loss=mean_square)
    targets = [n.meta.get("targets") for n in step.graph.find_nodes(op="placeholder")]
    assert ("a.weight", "b.weight") in targets


@pytest.mark.parametrize(("cls", "keeps"), [(BufferReplaced, False), (BufferDataReplaced, True)])
def test_replaced_buffers_are_outputs(cls: type[nn.Module], keeps: bool) -> None:
    """A buffer that forward replaces is one more output, known by its name."""
    step = _trace(cls(), normal(0, 16, 32), loss=mean_square)
    (entry,) = step.reassigned
    assert (entry.target, entry.output, entry.keeps_object) == ("mean", 1, keeps)
    assert len(step.outputs) == 2


def test_nothing_to_train_is_refused() -> None:
    """A model of which nothing requires grad is refused with a question."""
    with pytest.raises(CaptureError, match="frozen by mistake"):
        _trace(Three().requires_grad_(False), normal(0, 16, 32))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda out: out, "scalar tensor"),
        (lambda out: 3.0, "scalar tensor"),
        (lambda out: out.detach().sum(), "does not depend on the output"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, words: str) -> None:
    """loss_fn must return a scalar that depends on the output."""
    with pytest.raises(CaptureError, match=words):
        _trace(Three(), normal(0, 16, 32), loss=loss)


def test_an_argument_that_is_a_parameter_is_refused() -> None:
    """A parameter passed as an argument would be two inputs in one."""
    model = Three()
    with pytest.raises(CaptureError, match="parameter or buffer of the model itself"):
        _trace(model, model.a.weight)


def test_the_loss_region_by_hand() -> None:
    """The loss and its gradient are 4 bytes each, the tangent's stand-in 4, targets 16 * 32 * 4."""
    targets = normal(1, 16, 32)
    step = _trace(Three(), normal(0, 16, 32), loss=lambda out: (out * targets).sum())
    assert step.loss.held_bytes == 4 + 4 + 4
    assert step.loss.constant_bytes == 16 * 32 * 4
