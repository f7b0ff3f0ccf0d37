"""Kernels that refuse zeros are run for their memory nevertheless."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import custom_op

from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.private_torch.inductor import GeneratedCode
from planner import PlanError
from planner.compiled.generated import runnable
from planner.compiled.without_values import WithoutValues


@custom_op("remat_without_values::picky", mutates_args=())
def picky(x: Tensor) -> Tensor:
    """Accepts twos alone."""
    if not (x == 2).all():
        raise ValueError("only twos")
    return x.clone()


@pytest.mark.parametrize(
    "kernel",
    [
        torch.linalg.inv,
        torch.linalg.cholesky,
        lambda x: torch.linalg.solve(x, x),
        lambda x: torch.multinomial(x, 2),
        lambda x: torch.multinomial(x[0].expand(6, 4), 2),
        lambda x: torch._assert_async(x.sum() > 0),
    ],
    ids=["inv", "cholesky", "solve", "multinomial", "expanded", "check"],
)
def test_kernels_get_values_that_they_accept(kernel: Callable[[Tensor], Tensor]) -> None:
    given = torch.zeros(4, 4)
    freed = weakref.ref(given)
    with WithoutValues():
        kernel(given)
    del given
    assert freed() is None  # or memory would count that the step has freed


def test_a_kernel_that_accepts_none_is_named() -> None:
    with (
        pytest.raises(PlanError, match=r"picky.*ValueError: only twos.*aot_eager"),
        WithoutValues(),
    ):
        picky(torch.zeros(2))


def test_a_matrix_exponential_takes_what_it_takes_at_most() -> None:
    """Of small matrices it needs few terms, and none of zeros."""

    def taken(x: Tensor) -> int:
        return peak_extra_bytes(lambda: torch.linalg.matrix_exp(x))

    for shape in [(16, 16), (3, 16, 16)]:
        with WithoutValues():
            most = taken(torch.zeros(shape))
        assert most >= max(taken(torch.randn(shape) * size) for size in (1e-3, 0.1, 1.0, 50.0))
    assert taken(torch.zeros(16, 16)) < taken(torch.randn(16, 16))


def test_generated_code_runs_with_them() -> None:
    text = "import torch\ndef call(given):\n    return [torch.linalg.inv(given.pop())]"
    (made,) = runnable(GeneratedCode(text, {}))([torch.zeros(3, 3)])
    assert made.shape == (3, 3)
