"""The functional joint graph computes the captured step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from benchmarks.testing.zoo import ZOO
from graph_capture.calls.call_spec import bind_call, split_sample, tensors_of
from graph_capture.captured_step import CapturedStep
from planner.comparing.min_cut_graph import JointGraph, functional_twin, joint_graph
from tests.capturing import capture_step

from ..small import make

aten = torch.ops.aten


class WritesViews(nn.Module):
    """In-place calls on a view, read through the base and through another view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).sin()
        flat = y.view(-1)
        y[:, :3].mul_(2.0)
        y.add_(1.0)
        with torch.no_grad():
            self.seen.add_(y.mean(0))
        return (flat * y.reshape(-1).cos()).sum() + y[1:].pow(2).sum()


class Masks(nn.Module):
    """Dropout of elements and of whole channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 4, 1)
        self.elements, self.channels = nn.Dropout(0.25), nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.elements(self.inner(x)).sin()).sum()


def step_and_joint(model: nn.Module, sample: object) -> tuple[CapturedStep, JointGraph]:
    """A captured step, and the same written functionally."""
    arguments = bind_call(model.forward, *split_sample(sample))
    captured = capture_step(model, arguments, measure_scratch=False)
    return captured, joint_graph(captured)


def gradients_by(joint: JointGraph, captured: CapturedStep, model: nn.Module, sample: object):
    """What the joint graph computes, on copies of the model's tensors."""
    arguments = bind_call(model.forward, *split_sample(sample))
    given = list(tensors_of(arguments))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = []
    for node in captured.step.graph.find_nodes(op="placeholder"):
        role, target = node.meta["role"], node.meta["target"]
        if role == "input":
            inputs.append(given[int(target)])
        elif role == "constant":
            inputs.append(captured.step.constants[target])
        elif role != "tangent":
            inputs.append(state[target].detach().clone())
    inputs += [torch.ones(()) for _ in captured.step.tangents]
    results = Interpreter(GraphModule(nn.Module(), joint.graph)).run(*inputs)
    return results[: joint.num_forward_outputs], results[joint.num_forward_outputs :]


def check_against_eager(model: nn.Module, sample: object) -> None:
    """Output, gradients and new buffers of the joint graph beside eager's."""
    captured, joint = step_and_joint(model, sample)
    targets = [n.target for n in joint.graph.nodes]
    assert not any(t._schema.is_mutable for t in targets if isinstance(t, torch._ops.OpOverload))
    forward, gradients = gradients_by(joint, captured, model, sample)
    args, kwargs = split_sample(sample)
    output = model(*args, **kwargs)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    torch.testing.assert_close(forward[0], loss.detach())
    parameters = dict(model.named_parameters())
    for (leaf, _), gradient in zip(captured.step.gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, parameters[leaf.meta["target"]].grad)
    if isinstance(model, WritesViews):
        torch.testing.assert_close(forward[1], model.seen)


def test_calls_on_views_are_written_through() -> None:
    """Writes to a view show in its base and in other views, as in eager."""
    check_against_eager(make(WritesViews), torch.randn(4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "resnet50"])
def test_computes_what_eager_computes(name: str) -> None:
    """Loss and gradients of real models come out of the functional graph."""
    case = ZOO[name]("tiny")
    check_against_eager(case.make(), case.sample(0))


def test_dropout_of_elements_is_one_call_and_of_channels_is_not() -> None:
    """AOTAutograd has native_dropout for the one and a draw and products for the other."""
    captured, joint = step_and_joint(make(Masks), torch.randn(2, 2, 3, 3))
    (fused,) = joint.graph.find_nodes(op="call_function", target=aten.native_dropout.default)
    assert fused.args[1:] == (0.25, True)
    (back,) = joint.graph.find_nodes(
        op="call_function", target=aten.native_dropout_backward.default
    )
    mask = back.args[1]
    assert isinstance(mask, torch.fx.Node)
    assert captured.graph.storages[joint.storage_of[mask.name]].size_bytes == 2 * 4 * 9
    assert back.args[2] == pytest.approx(1 / 0.75)
    (draw,) = joint.graph.find_nodes(op="call_function", target=aten.bernoulli.p)
    assert draw.meta["val"].shape == (2, 4, 1, 1)


@pytest.mark.parametrize(
    ("func", "twin"),
    [
        (aten.mul_.Tensor, aten.mul.Tensor),
        (aten.mul.out, aten.mul.Tensor),
        (aten.bernoulli_.float, aten.bernoulli.p),
        (aten.copy_.default, aten.copy.default),
        (aten.gelu_backward.grad_input, aten.gelu_backward.default),
        (aten.sin.default, aten.sin.default),
        (aten.normal_.default, aten.normal_.default),
    ],
)
def test_twins_compute_the_same_and_write_nowhere(func: object, twin: object) -> None:
    """By their arguments; what has no twin is its own."""
    assert functional_twin(func) is twin
