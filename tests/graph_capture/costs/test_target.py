"""Where a step is captured for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.testing.zoo import (
    ZOO,
    Case,
    cases,
)
from graph_capture.absent_cuda.guard import ensure_cuda_guard
from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from graph_capture.costs.devices import DEVICES
from graph_capture.costs.target import Target, target_of
from graph_capture.errors import CaptureError
from graph_capture.recording.fake_inputs import FakeInputs
from tests.capturing import capture_step

VARIED = ("gpt2_bf16", "unet", "many_outputs", "lstm", "mixture_of_experts")
"""Autocast, branches, several outputs, recurrence, routing."""
LARGER = ("t5", "resnet50")
"""Two stacks, statistics: slow, since they take longest."""


def _model(device: str) -> nn.Module:
    return nn.Linear(3, 2, device=device)


def _capture(case: Case, model: nn.Module, device: str | None = None) -> CapturedStep:
    args, kwargs = split_sample(case.sample(0))
    arguments = bind_call(model.forward, args, kwargs)
    with case.context():
        return capture_step(
            model,
            arguments,
            loss=case.loss_fn,
            measure_scratch=False,
            target=target_of(model, [], device),
        )


def _on_meta(case: Case) -> nn.Module:
    with torch.device("meta"):
        return case.build()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_a_device_it_is_where_the_model_lies(device: str) -> None:
    """A model on meta is planned for the CPU, whose calls can be run without the model."""
    target = target_of(_model(device), [torch.zeros(1)])
    assert target.device is DEVICES["cpu"]
    assert target.torch_device == torch.device("cpu")
    assert target.at_hand
    assert not target.absent
    assert not target.imitated


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_card_that_is_not_there(device: str) -> None:
    """Everything is placed on its first device, and its choices must be imitated."""
    target = target_of(_model(device), [], "h100")
    assert target.torch_device == torch.device("cuda:0")
    assert target.elsewhere
    assert target.absent
    assert target.imitated
    assert not target.at_hand
    assert target.place(torch.device(device)) == torch.device("cuda:0")


def test_a_card_beside_another_is_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning for an H100 beside an A100 needs imitation, but not another autograd."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))

    def target(name: str) -> Target:
        return Target(
            device=DEVICES[name], torch_device=torch.device("cuda:0"), at_hand=False, elsewhere=True
        )

    assert target("h100").imitated
    assert not target("h100").absent
    assert not target("a100").imitated


def test_an_unknown_device_is_named() -> None:
    """The error lists the known ones."""
    with pytest.raises(ValueError, match="unknown device 'z9000'; known are cpu"):
        target_of(_model("cpu"), [], "z9000")


def test_several_devices_are_refused() -> None:
    """A model that is spread out is planned one part at a time."""
    fakes = FakeTensorMode()
    with fakes:
        spread = [torch.empty(2, device=f"cuda:{i}") for i in range(2)]
    with pytest.raises(CaptureError, match="several devices"):
        target_of(nn.Linear(1, 1), spread)


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
def test_a_model_on_meta_is_captured_as_on_the_cpu(case: Case) -> None:
    """Its graph has the fingerprint of the same model on the CPU."""
    on_cpu = _capture(case, case.make())
    on_meta = _capture(case, _on_meta(case))
    assert on_meta.graph.fingerprint == on_cpu.graph.fingerprint
    assert on_meta.graph.operators == on_cpu.graph.operators


class _Tied(nn.Module):
    """One parameter in two places, a parameter that is a view of a buffer's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        memory = torch.zeros(3, 8)
        self.register_buffer("rows", memory[:2])
        self.row = nn.Parameter(memory[2])

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.row + self.rows.sum()).sum()


def _fake(case_or_class: Any, device: str) -> nn.Module:
    ensure_cuda_guard()  # which fills a module's weights with a device that is not there
    with FakeTensorMode(), torch.device(device):
        return case_or_class()


@pytest.mark.parametrize("name", ["gpt2", "resnet50"])
def test_a_fake_model_is_captured_as_a_real_one(name: str) -> None:
    """A model made under the user's own FakeTensorMode gives the same graph."""
    case = ZOO[name]("tiny")
    real = _capture(case, case.make())
    fake = _capture(case, _fake(case.build, "cpu"))
    assert fake.graph.fingerprint == real.graph.fingerprint


@pytest.mark.parametrize("device", [None, "h100"])
def test_stand_ins_share_memory_as_the_tensors_do(device: str | None) -> None:
    """Tied weights stay one tensor and views stay views, from CPU, meta and fake tensors."""
    for model in (_Tied(), _fake(_Tied, "cpu"), _on(_Tied, "meta")):
        target = target_of(model, [], device)
        twins = FakeInputs(FakeTensorMode(), target)
        row, rows = twins.of(model.row), twins.of(model.rows)
        assert row.untyped_storage()._cdata == rows.untyped_storage()._cdata
        assert row.storage_offset() == 16
        assert row.is_leaf
        assert row.requires_grad
        assert row.device == target.torch_device


@pytest.mark.parametrize("device", [None, "h100"])
def test_stand_ins_are_as_large_as_the_memory_behind(device: str | None) -> None:
    """A buffer that is a part of what was made for it counts whole, as a periodic window is."""
    layer = nn.Linear(4, 4)
    layer.register_buffer("window", torch.ones(33)[:-1])
    twin = FakeInputs(FakeTensorMode(), target_of(layer, [], device)).of(layer.window)
    assert twin.untyped_storage().nbytes() == 33 * 4


def _on(make: Any, device: str) -> nn.Module:
    with torch.device(device):
        return make()


def _graph(model: nn.Module, device: str | None, x: Tensor | None = None) -> CostGraph:
    x = torch.zeros(4, 8) if x is None else x
    target = target_of(model, [x], device)
    return capture_step(model, {"x": x}, measure_scratch=False, target=target).graph


@pytest.mark.parametrize("device", [None, "h100"])
def test_shared_memory_is_counted_once(device: str | None) -> None:
    """The graph of a model with tied weights is the same from the CPU, meta and a fake model."""
    models = (_Tied(), _on(_Tied, "meta"), _fake(_Tied, "cpu"))
    graphs = [_graph(model, device) for model in models]
    assert len({graph.fingerprint for graph in graphs}) == 1
    weights = [s for s in graphs[0].storages if s.category == "parameter"]
    assert len(weights) == 4  # one weight, two biases, the memory that row and rows share


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_fake_model_on_a_card_that_is_not_there() -> None:
    """The user's own fake CUDA model is captured for the card that is named."""
    model = _fake(_Tied, "cuda:0")
    with FakeTensorMode():
        x = torch.zeros(4, 8, device="cuda:0")
    assert _graph(model, "h100", x).fingerprint == _graph(_Tied(), "h100").fingerprint
    with pytest.raises(ValueError, match="device='h100'"):
        target_of(model, [x])
