"""Gradient formulas that PyTorch takes differently while a dispatch mode records."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as gradient_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.sweeps.operator_cases import NoCase, all_cases, arguments_of, strides_of
from benchmarks.testing.bitwise import (
    assert_same_tensors,
    assert_same_training,
)
from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.costs.cost_model import Call
from graph_capture.costs.workspace import WorkspaceProbe
from graph_capture.recording.eager_formulas import take_eager_formulas
from planner import optimize
from tests.capturing import capture_step


def _some_zeros(t: Tensor) -> Tensor:
    return torch.where((torch.arange(t.numel()).view(t.shape) % 7) == 3, 0.0, t)


def _one_zero(t: Tensor) -> Tensor:
    return torch.where(torch.arange(t.numel()).view(t.shape) == 3, 0.0, t)


_CHECKERED = torch.arange(40).view(8, 5) % 2 == 0

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "prod": lambda h: h[:2, 0, :3].prod(),
    "prod with a zero": lambda h: _one_zero(h[:2, 0, :3]).prod(),
    "prod with zeros": lambda h: _some_zeros(h[:2, 0]).prod(),
    "prod(dim)": lambda h: h.prod(1),
    "prod(dim, keepdim)": lambda h: h.prod(-1, keepdim=True),
    "prod(dim) with zeros": lambda h: _some_zeros(h).prod(1),
    "prod(dim) of a transposed tensor": lambda h: _some_zeros(h.transpose(1, 2)).prod(1),
    "cumprod": lambda h: h.cumprod(-1),
    "cumprod with zeros": lambda h: _some_zeros(h).cumprod(1),
    "cumprod with zeros, transposed": lambda h: _some_zeros(h.transpose(0, 2)).cumprod(0),
    "max": lambda h: -h.max(),
    "min": lambda h: -h.round(decimals=1).min(),
    "median": lambda h: -h.median(),
    "nanmedian": lambda h: -h.nanmedian(),
    "masked_fill": lambda h: h.masked_fill(h > 0.2, h.mean()),
    "complex prod": lambda h: torch.complex(h, 2 * h).prod(1).abs(),
    "masked prod": lambda h: torch.masked.prod(h, 1, mask=h > 0),
    "masked_select of a transposed tensor": lambda h: h.mT.masked_select(_CHECKERED),
    "householder_product, transposed": lambda h: torch.linalg.householder_product(h.mT, h[:, :, 0]),
    "ormqr, transposed": lambda h: torch.ormqr(h.mT, h[:, :, 0], h.mT),
}


class _Between(nn.Module):
    """A formula between two layers."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self._formula = [formula]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h) * self._formula[0](h).sum()


def _loss(output: Tensor) -> Tensor:
    return output.square().mean()


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_have_eager_bits(name: str) -> None:
    """What is planned takes the formula that eager takes, whatever the values are."""
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plan = optimize(_Between(FORMULAS[name]), x, budget_gb=1, loss_fn=_loss)
    assert_same_training(
        lambda: _Between(FORMULAS[name]), plan.apply, lambda _seed: x, loss_fn=_loss, steps=1
    )


class _InForward(nn.Module):
    """A formula whose gradient is taken in forward, for another backward pass or as it is."""

    def __init__(self, formula: Callable[[Tensor], Tensor], again: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self._formula, self._again = [formula], again

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        made = self._formula[0](h).square().sum()
        (gradient,) = gradient_of(made, h, create_graph=self._again)
        return self.last(h) * gradient.sin()


@pytest.mark.parametrize(
    ("name", "again"),
    [
        *((name, True) for name in FORMULAS if "transposed" not in name),
        ("prod(dim) with zeros", False),
        ("cumprod", False),
        ("max", False),
    ],
)
def test_gradients_taken_in_forward_have_eager_bits(name: str, again: bool) -> None:
    """Forward's own gradients are made as eager makes them, and differentiated again likewise."""
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))

    def make() -> nn.Module:
        return _InForward(FORMULAS[name], again)

    torch.manual_seed(0)
    plan = optimize(make(), x, budget_gb=1, loss_fn=_loss)
    assert_same_training(make, plan.apply, lambda _seed: x, loss_fn=_loss, steps=1)


class _Silent(TorchDispatchMode):
    """What PyTorch sees of a capture."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _gradients(call: Callable[..., Any], given: tuple[Any, ...], mode: bool) -> list[Any]:
    """Of the arguments, by weights that are all different; strides and values."""
    torch.manual_seed(0)
    with _Silent() if mode else nullcontext():
        leaves = [g * 1 for g in given]
        outputs = [t for t in tree_leaves(call(*leaves)) if t.requires_grad]
        if mode:
            take_eager_formulas(outputs)
        weights = [torch.linspace(0.5, 1.5, t.numel()).view(t.shape).to(t.dtype) for t in outputs]
        made = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [None if t is None else (strides_of(t), t.nan_to_num().tolist()) for t in made]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("start", range(4))
def test_no_other_gradient_depends_on_a_mode(start: int) -> None:
    """Of PyTorch's operators none has other gradients under a mode than without, once mended."""
    differing = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's samples call deprecated things, too
        cases = [c for c in all_cases(1) if c.kind == "operator" and c.layout == "transposed"]
        for case in cases[start::4]:
            try:
                call, given = arguments_of(case)
                eager = _gradients(call, given, mode=False)
            except (NoCase, RuntimeError, ValueError, TypeError, NotImplementedError):
                continue  # does not train in this layout
            if _gradients(call, given, mode=True) == eager:
                continue
            if _gradients(call, given, mode=False) == eager:  # a second time, too
                differing.add(case.name)
    # Refused: its sizes depend on values.
    assert differing <= {"linalg.lstsq", "linalg.lstsq.grad_oriented"}


def test_operator_runs_twice_alike() -> None:
    """A formula's operator may be recomputed: it is pinned by nothing."""
    x = torch.randn(6, 5, 8)
    step = capture_step(_Between(FORMULAS["cumprod"]), {"x": x}, loss=_loss)
    code = [op for op in step.graph.operators if "remat.cumprod_backward" in op.target]
    assert [op.pinned for op in code] == [None]


def _gradient_of(name: str, num_zeros: int) -> Call:
    """The gradient of a product of 64 x 64 factors, the first of them zero."""
    ops, grad, given = torch.ops.remat, torch.ones(64, 64), torch.linspace(1, 2, 4096)
    given[:num_zeros] = 0
    given = given.view(64, 64)
    func, args = {
        "prod": (ops.prod_backward, (torch.ones(()), given, given.prod())),
        "prod(dim)": (ops.prod_dim_backward, (grad[:, :1], given, given.prod(1), 1, True)),
        "cumprod": (ops.cumprod_backward, (grad, given, given.cumprod(1), 1)),
    }[name]
    return Call(func=func.default, args=args, kwargs={}, out=given.clone(), grad_enabled=False)


@pytest.mark.parametrize("name", ["prod", "prod(dim)", "cumprod"])
def test_scratch_is_that_of_the_worst_values(name: str) -> None:
    """However many factors are zero, a gradient takes what is counted: three tensors at most."""

    def taken(call: Call) -> int:
        made: list[Tensor] = []
        return peak_extra_bytes(lambda: made.append(call.func(*call.args))) - made[0].nbytes

    worst = max(taken(_gradient_of(name, num_zeros)) for num_zeros in (0, 1, 700, 4096))
    counted = WorkspaceProbe("cpu", at_hand=True).bytes_of(_gradient_of(name, 0))
    assert worst <= counted <= 3 * 4096 * 4


def test_zeros_leave_the_strides_as_captured() -> None:
    """The branch with zeros hands out the strides of the one without, with eager's values."""
    given = torch.randn(5, 3, 4).transpose(0, 2)
    strides = []
    for values in (given, torch.where(given > 1, 0.0, given)):
        values = values.clone().requires_grad_()
        result = values.prod(1)
        (expected,) = torch.autograd.grad(result.sum(), values)
        made = torch.ops.remat.prod_dim_backward(
            torch.ones_like(result), values.detach(), result.detach(), 1, False
        )
        strides.append(made.stride())
        assert_same_tensors({"gradient": expected}, {"gradient": made})
    assert strides[0] == strides[1]
