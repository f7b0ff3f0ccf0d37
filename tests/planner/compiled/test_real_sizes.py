"""Memory that stand-ins do not show: it is in the predicted peak all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_capture.errors import CaptureError
from planner import PlanWarning
from planner.compiled.subgraphs import NOT_COUNTED
from planner.measuring.measure import measure
from tests.planner.compiled.models import assert_same, compiled, step


class _Bags(nn.Module):
    """Bags of embeddings, whose kernels hand out more than stand-ins say."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = nn.EmbeddingBag(200, 32, mode="max")
        self.mean = nn.EmbeddingBag(200, 32, mode="mean")
        self.last = nn.Linear(64, 64)

    def forward(self, places: Tensor, starts: Tensor) -> Tensor:
        bags = torch.cat([self.largest(places, starts), self.mean(places, starts)], -1)
        return torch.sin(self.last(torch.sin(self.last(bags)))).square().mean()


class _Frequencies(nn.Module):
    """A Fourier transform, whose gradient writes to a part of a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(33, dtype=torch.cfloat))
        self.first = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.weight, n=64).square().mean()


class _Branches(nn.Module):
    """Graphs inside of a call, whose memory is in no node of the joint graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.yes, self.no = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        h = torch.cond(
            h.sum() > 0, lambda h: F.gelu(self.yes(h)), lambda h: torch.tanh(self.no(h)), (h,)
        )
        return F.gelu(self.first(h)).square().mean()


class _Loop(nn.Module):
    """A loop inside of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def body(carried: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
            new = torch.tanh(self.inner(carried) + given)
            return new, new.clone()

        start = torch.zeros(16, 32)
        _, all_of_them = scan(body, start, F.gelu(self.outer(x)))  # type: ignore[no-untyped-call]
        return F.gelu(self.outer(all_of_them)).square().mean()


def _bags() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Bags(), (torch.randint(0, 200, (512,)), torch.arange(0, 512, 8))


def _frequencies() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Frequencies(), (torch.randn(64, 64),)


def _branches() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Branches(), (torch.randn(128, 64),)


def _loop() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Loop(), (torch.randn(8, 16, 32),)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "budget_bytes"),
    [(_bags, 10**9), (_frequencies, 10**9), (_branches, 290_000), (_loop, 10**9)],
)
def test_predicted_peak_is_the_measured_one(
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], budget_bytes: int
) -> None:
    """To the byte, with the bits of the step without a budget."""
    torch.manual_seed(0)
    model, sample = make()
    torch.compiler.reset()
    expected = step(model, torch.compile(model, backend="aot_eager"), *sample)
    call, plans = compiled(model, budget_bytes=budget_bytes, time_limit_s=1)
    assert_same(step(model, call, *sample), expected)
    measured = measure(call, sample, repeats=0).peak_bytes
    assert measured == plans[-1].predicted_peak_bytes <= plans[-1].budget_bytes


class _Until(nn.Module):
    """A loop that ends when it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        with torch.no_grad():
            (far,) = while_loop(lambda t: t.sum() < 100, lambda t: (t + 1,), (x,))  # type: ignore[no-untyped-call]
        return (self.first(x) * far).square().mean()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_loop_that_may_not_end_is_named() -> None:
    """It is not tried on made-up values, and a warning says that its memory is not counted."""
    torch.manual_seed(0)
    model, sample = _Until(), torch.randn(8, 16)
    expected = step(model, model, sample)
    call, _ = compiled(model, budget_gb=1)
    said = NOT_COUNTED.partition("{")[0] + ".*while_loop.*may not end"
    with pytest.warns(PlanWarning, match=said):
        found = step(model, call, sample)
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_rounds_of_a_loop_are_not_read_and_it_is_said() -> None:
    """Inductor's code is read without its kernels, so that no loop has a round."""

    class Made(Exception):
        """The plan is there; compiling is not wanted."""

    def on_plan(_plan: Any) -> None:
        raise Made

    call, _ = compiled(_Until(), lower="inductor", budget_gb=1, on_plan=on_plan)
    said = "while_loop.*generated loops are not run"
    with pytest.warns(PlanWarning, match=said), pytest.raises(Exception, match="Made"):
        call(torch.randn(8, 16))


class _Uneven(nn.Module):
    """A branch that takes much more than the other one, and is the one that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        h = torch.cond(
            h.square().sum() > 0,
            lambda h: F.gelu(self.down(F.gelu(self.up(h)))),
            lambda h: torch.tanh(h),
            (h,),
        )
        return F.gelu(self.first(h)).square().mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_generated_code_is_read_for_both_branches() -> None:
    """The predicted peak is that of the branch that takes more."""
    torch.manual_seed(0)
    model, sample = _Uneven(), torch.randn(128, 32)
    call, plans = compiled(model, lower="inductor", budget_gb=1)
    step(model, call, sample)
    measured = measure(call, sample, repeats=0).peak_bytes
    assert measured == plans[0].predicted_peak_bytes


class _Sparse(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)

    def forward(self, places: Tensor) -> Tensor:
        return self.table(places).square().mean()


def test_sparse_gradients_are_refused_by_name() -> None:
    """Nothing is known of their size; the error says what to do."""
    call, _ = compiled(_Sparse(), budget_gb=1)
    with pytest.raises(Exception, match=r"layout torch.sparse_coo.*sparse=False") as caught:
        call(torch.arange(4))
    error: Any = caught.value
    assert isinstance(error.inner_exception, CaptureError)
