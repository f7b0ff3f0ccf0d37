"""Kernels fused by rule: what joins, what needs memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from graph_capture.calls.storage_id import storage_id
from graph_capture.costs.devices import device_for
from planner.compiled.fused_groups import fuse, kernel_ns
from planner.compiled.joint_step import JointStep, tensors_of
from tests.planner.compiled.test_joint_step import joint_step_of


def _names(step: JointStep) -> list[list[str]]:
    return [[call.name for call in group] for group in fuse(step).groups]


def test_elementwise_calls_join_their_only_reader() -> None:
    """A chain before a reduction is one kernel."""
    x = torch.randn(4, 6, requires_grad=True)
    step = joint_step_of(lambda x: (x.detach() * 2 + 1).sum() + x.sum(), x)
    (joined,) = [g for g in _names(step) if "mul" in g]
    assert joined[:2] == ["mul", "add"]


def test_a_product_reads_memory() -> None:
    """What a matrix product reads is no part of a kernel before it."""
    x, w = torch.randn(4, 6), torch.randn(6, 6, requires_grad=True)
    step = joint_step_of(lambda x, w: ((x * 2).sin() @ w).sum(), x, w)
    groups = _names(step)
    assert ["mul", "sin"] in groups
    assert ["mm"] in groups


def test_a_depthwise_convolution_is_no_kernel_of_ours() -> None:
    """It was an error once: its class asked a node of the graph for its shape."""
    x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3, requires_grad=True)
    step = joint_step_of(lambda x, w: torch.conv2d(x, w, groups=4).sin().sum(), x, w)
    assert ["convolution"] in _names(step)


def test_what_backward_reads_has_memory() -> None:
    """The tanh is read by the sum and by its own gradient, so one may save it."""
    x = torch.randn(4, 6, requires_grad=True)
    step = joint_step_of(lambda x: (x * 3).tanh().square().sum(), x)
    found = fuse(step)
    (tanh,) = [c for c in step.calls if c.name == "tanh"]
    (mul,) = [c for c in step.calls if c.name == "mul"]
    assert {storage_id(t) for t in tensors_of(mul.meta["val"])} <= found.inner
    assert found.inner.isdisjoint(storage_id(t) for t in tensors_of(tanh.meta["val"]))


def test_slow_functions_cost_their_time_in_a_kernel() -> None:
    """Per element of the loop, beside what is read and written: drawing again is dear."""
    x = torch.randn(1000, 1000, requires_grad=True)
    device = replace(
        device_for("cpu"),
        bytes_per_s=1e9,
        launch_ns=1,
        fused_element_ns={"aten::tanh": 5.0},
        element_ns={"aten::tanh": 900.0, "aten::mul": 900.0},
    )
    step = joint_step_of(lambda x: (x * 3).tanh().sum(), x)
    node = next(n for n in step.calls if n.name == "tanh")
    product = next(n for n in step.calls if n.name == "mul")
    moved_ns = 2 * 4 * 1000 * 1000
    assert kernel_ns([product], step.primals, device) == moved_ns
    assert kernel_ns([product, node], step.primals, device) == moved_ns + 5 * 1000 * 1000
    assert device_for("cpu").fused_element_ns["prims::inductor_random"] > 1


def test_calls_that_nothing_needs_are_in_no_group() -> None:
    """Inductor's passes leave some where a part of a tensor is written."""
    x = torch.randn(4, 6, requires_grad=True)
    step = joint_step_of(lambda x: (x * 2).sin().sum(), x)
    read = next(n for n in step.calls if n.name == "mul")
    with step.module.graph.inserting_after(read):
        unused = step.module.graph.call_function(torch.ops.aten.cos.default, (read,))
    unused.meta["val"] = read.meta["val"].clone()
    assert unused not in {call for group in fuse(step).groups for call in group}


def test_every_call_is_in_one_group() -> None:
    """In base order, forward's groups first."""
    x, w = torch.randn(4, 6), torch.randn(6, 6, requires_grad=True)
    step: Any = joint_step_of(lambda x, w: (x @ w).softmax(-1).square().mean(), x, w)
    groups = fuse(step).groups
    assert sorted(c.name for g in groups for c in g) == sorted(c.name for c in step.calls)
    place = {call: i for i, call in enumerate(step.calls)}
    lasts = [max(place[c] for c in g) for g in groups]
    assert lasts == sorted(lasts)
