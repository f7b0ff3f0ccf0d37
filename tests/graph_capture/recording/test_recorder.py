"""Calls, written down as they are dispatched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.calls.writes import written_arguments
from graph_capture.errors import CaptureError
from graph_capture.recording.recorder import Recorder, functional_twin

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("func", "twin"),
    [
        (aten.squeeze_.dim, aten.squeeze.dim),
        (aten.transpose_.default, aten.transpose.int),
        (aten.t_.default, aten.t.default),
        (aten.unsqueeze_.default, aten.unsqueeze.default),
        (aten.as_strided_.default, aten.as_strided.default),
    ],
)
def test_views_in_place_have_a_twin(
    func: torch._ops.OpOverload, twin: torch._ops.OpOverload
) -> None:
    """Each view in place has the function that returns the view, whatever its overload's name."""
    assert functional_twin(func) is twin


def test_what_a_schema_writes_to() -> None:
    """Only arguments that the schema marks as written count, given by name or by place."""
    a, b, c = (torch.zeros(1) for _ in range(3))
    assert written_arguments(aten.add_.Tensor, (a, b), {}) == [a]
    assert written_arguments(aten.mul.out, (a, b), {"out": c}) == [c]
    assert written_arguments(aten.add.Tensor, (a, b), {}) == []


class _Recording:
    """A recorder with one declared input of shape [4, 6]."""

    def __init__(self) -> None:
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = Recorder()
        self.x = self.fake_mode.from_tensor(torch.zeros(4, 6))
        self.node = self.recorder.placeholder("x", self.x, role="input")

    def calls(self) -> list[str]:
        return [str(n.target) for n in self.recorder.graph.nodes if n.op == "call_function"]


def test_calls_are_recorded_in_order_with_their_writes() -> None:
    """An in-place call names the node that it writes to."""
    run = _Recording()
    with run.fake_mode, run.recorder:
        y = run.x + 1
        y.mul_(2)
    add, mul = list(run.recorder.graph.nodes)[1:]
    assert run.calls() == ["aten.add.Tensor", "aten.mul_.Tensor"]
    assert mul.meta["writes"] == (add,)
    assert run.recorder.node_of(y) is add


def test_a_view_in_place_becomes_another_node() -> None:
    """After x.t_() the tensor is a new node, and the old one keeps its shape."""
    run = _Recording()
    with run.fake_mode, run.recorder:
        y = run.x * 1
        y.t_()
    product, view = list(run.recorder.graph.nodes)[1:]
    assert run.calls() == ["aten.mul.Tensor", "aten.t.default"]
    assert tuple(product.meta["val"].shape) == (4, 6)
    assert tuple(view.meta["val"].shape) == (6, 4)
    assert run.recorder.node_of(y) is view


def test_exchanged_memory_is_noticed() -> None:
    """After x.data = y the tensor x is the node of y's memory, and the input keeps its own."""
    run = _Recording()
    with run.fake_mode, run.recorder:
        y = run.x + 1
        run.x.data = y
        z = run.x * 2
    add = next(n for n in run.recorder.graph.nodes if str(n.target) == "aten.add.Tensor")
    product = run.recorder.node_of(z)
    assert product.args[0] in (add, *add.users)
    assert run.node.meta["val"].untyped_storage()._cdata != y.untyped_storage()._cdata


def test_real_tensors_are_constants_once() -> None:
    """A real tensor becomes one placeholder, however often it is read."""
    run = _Recording()
    ones = torch.ones(6)
    with run.fake_mode, run.recorder:
        _ = (run.x + ones) * ones
    assert list(run.recorder.constants.values()) == [ones]


def test_a_stray_parameter_is_refused() -> None:
    """A real tensor that requires grad is refused: it would get no gradient."""
    run = _Recording()
    stray = torch.ones(6, requires_grad=True)
    with (
        run.fake_mode,
        run.recorder,
        pytest.raises(CaptureError, match="register it as one") as caught,
    ):
        _ = run.x + stray
    assert "test_recorder.py:" in str(caught.value)


def test_calls_know_their_module() -> None:
    """Calls carry the path of the innermost module and the line of the model."""
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU()))
    run = _Recording()
    with run.fake_mode, run.recorder, run.recorder.module_paths(model):
        model(run.x)
    (relu,) = [n for n in run.recorder.graph.nodes if n.op == "call_function"]
    assert relu.meta["module_path"] == "1.0"
    assert relu.meta["source"].startswith("test_recorder.py:")


def test_hooks_are_taken_away() -> None:
    """After module_paths no global hook is left."""
    before = len(torch.nn.modules.module._global_forward_hooks)
    with Recorder().module_paths(nn.ReLU()):
        pass
    assert len(torch.nn.modules.module._global_forward_hooks) == before
