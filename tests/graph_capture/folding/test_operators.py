"""Calls folded into operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_capture.captured_step import CapturedStep
from tests.capturing import capture_step

from ..odd import WIDTH, Three, mean_square, normal


def _capture(model: nn.Module) -> CapturedStep:
    return capture_step(model, {"x": normal(0, 16, WIDTH)}, loss=mean_square)


def _forward_targets(captured: CapturedStep) -> list[str]:
    return [op.target for op in captured.graph.operators if op.phase == "forward"]


def test_views_are_no_operators() -> None:
    """Transposes, reshapes and slices leave no operator and no storage."""

    class Views(Three):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.view(4, 4, WIDTH).transpose(0, 1).transpose(0, 1).view(16, WIDTH)[:, :])

    assert _forward_targets(_capture(Views())) == ["aten.addmm.default", "aten.addmm.default"]


def test_calls_in_place_join_what_they_write_to() -> None:
    """relu_ on a fresh product is one operator with it, and one storage of 2048 bytes."""

    class InPlace(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu_(self.a(x)))

    captured = _capture(InPlace())
    assert _forward_targets(captured)[0] == "aten.addmm.default+aten.relu_.default"
    (k,) = captured.graph.operators[0].outputs
    assert captured.graph.storages[k].size_bytes == 16 * WIDTH * 4


def test_what_others_have_read_is_cloned_first() -> None:
    """A call that overwrites what another operator has read starts with a copy of it."""

    class Overwrites(Three):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x) * 1
            y = torch.sigmoid(h)
            h.add_(y)
            return self.c(h)

    captured = _capture(Overwrites())
    (v,) = [i for i, code in enumerate(captured.code) if code.clones]
    ((old, new),) = captured.code[v].clones
    assert "add_" in captured.graph.operators[v].target
    assert old in captured.graph.operators[v].inputs
    assert new in captured.graph.operators[v].outputs
    sizes = [captured.graph.storages[k].size_bytes for k in (old, new)]
    assert sizes == [16 * WIDTH * 4] * 2


def test_what_nobody_reads_is_dropped() -> None:
    """An operator whose result is not used is no part of the step, unless it draws."""

    class Idle(Three):
        def forward(self, x: Tensor) -> Tensor:
            torch.sin(x)
            torch.rand_like(x)
            return self.a(x)

    targets = _forward_targets(_capture(Idle()))
    assert not any("sin" in t for t in targets)
    assert sum("rand_like" in t for t in targets) == 1


def test_every_forward_operator_knows_its_place() -> None:
    """Operators of forward carry module path and source line."""
    graph = _capture(Three()).graph
    forward = [op for op in graph.operators if op.phase == "forward"]
    assert {op.module_path for op in forward if "addmm" in op.target} == {"a", "b", "c"}
    assert all(":" in op.source for op in forward)


def test_backward_operators_belong_to_the_module_of_their_forward() -> None:
    """A backward product has the module path of the layer that it differentiates."""
    graph = _capture(Three()).graph
    backward = [op.module_path for op in graph.operators if op.phase == "backward"]
    assert {"a", "b", "c"} <= set(backward)
