"""Whether the functions that generated code calls come to the operators of the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph
from torch.utils._python_dispatch import TorchDispatchMode

from planner import optimize
from planner.running.fast_calls import fast_call
from planner.running.rewrite import rewrite
from tests.planner.small import Net, make, plan_for, sample, square

aten = torch.ops.aten


def found(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What is called for an operator with tensors as arguments."""
    graph = Graph()

    def as_node(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        node = graph.placeholder("x")
        node.meta["val"] = x
        return node

    return fast_call(func, tuple(map(as_node, args)), {k: as_node(v) for k, v in kwargs.items()})


class Runs(Net):
    """Reads how many runs of equal numbers there are, and which."""

    def forward(self, x, given):
        return super().forward(x) * torch.unique_consecutive(given).sum()


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.add.Tensor, (X, X), {}),
        (aten.add.Tensor, (X, X), {"alpha": 2}),
        (aten.mul.Tensor, (X, 2.0), {}),
        (aten.view.default, (X, [3, 2]), {}),
        (aten.sum.dim_IntList, (X, [0], True), {}),
        (aten.mm.default, (X, X), {}),
        (aten.gelu.default, (X,), {"approximate": "tanh"}),
        (aten.mul.out, (X, X), {"out": X}),
        (aten.add_.Tensor, (X, X), {}),
        (aten.add.Scalar, (X, 2), {}),  # a composite of what the function comes to at once
        (aten.empty_like.default, (X,), {"dtype": torch.bool}),
        (aten._to_copy.default, (X,), {"dtype": torch.float64}),
    ],
)
def test_a_function_of_pytorch_is_found(func, args, kwargs):
    """Usual calls are made by name."""
    assert found(func, *args, **kwargs) is not None


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten._to_copy.default, (X,)),  # no function of that name
        (aten.empty.memory_format, ([2, 3],)),  # no tensor: a default device may have its say
    ],
)
def test_only_the_operator_itself_will_do(func, args):
    """Where no function comes to the very operator, there is none."""
    assert found(func, *args) is None


def test_a_copy_is_a_copy():
    """``x.to(dtype)`` of that very dtype is no copy."""
    assert found(aten._to_copy.default, X, dtype=X.dtype) is None


def test_a_function_is_what_its_name_stands_for() -> None:
    """``torch.block_diag`` is a wrapper that takes its tensors one by one, not a list of them."""
    node = Graph().placeholder("x")
    node.meta["val"] = X
    assert fast_call(aten.block_diag.default, ([node, node],), {}) is None


def test_what_is_called_hands_out_what_the_operator_does():
    """No function written in Python is taken, which may return a part of the results."""
    model = make(Runs)
    runs = torch.tensor([1.0, 1.0, 2.0])
    plan = optimize(model, (sample(), runs), budget_gb=1, loss_fn=square)
    outputs = []
    for made in (plan.apply(model), make(Runs)):
        torch.manual_seed(0)
        outputs.append(made(sample(), runs))
    assert torch.equal(*outputs)


def test_every_function_comes_to_its_operator():
    """The planned graphs of a model dispatch, call for call, the operators of the traced step."""
    model = make(Net)
    plan = plan_for(model, sample(), loss_fn=square)
    captured = plan._live.captured
    graphs = rewrite(captured, plan.schedule)
    expected = [n.meta["operator"] for n in graphs.forward.graph.nodes if "operator" in n.meta]
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model = plan.apply(make(Net))
    model(sample())
    step = model.forward._main.prepared[0].step
    inputs = [fetch([sample()]) for fetch in step._layout.fetch]
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), Watch():
        step._forward(inputs[: step._num_forward])
    composites = {aten.to.dtype: aten._to_copy.default, aten.div_.Tensor: aten.div_.Scalar}
    named = [composites.get(f, f) for f in seen]
    assert [f for f in named if f in set(expected)] == expected
