"""Stand-ins of results lie in memory as the kernels' own results do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.testing.bitwise import assert_same_training
from graph_capture.recording.fake_call_cache import FakeCallCache
from graph_capture.recording.real_results import RealResults
from planner import measure, optimize

aten = torch.ops.aten

# Contiguous, and channels last as well: what a permutation makes of one picture element.
TWO_FORMATS = torch.rand(2, 1, 1, 8).permute(0, 3, 1, 2)

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "layer_norm": lambda h: F.layer_norm(h, (h.shape[-1],)),
    "group_norm": lambda h: F.group_norm(h, 4),
    "instance_norm": F.instance_norm,
}


class _Transposed(nn.Module):
    """A normalization over a transposed activation."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self._norm = [norm]

    def forward(self, x: Tensor) -> Tensor:
        normal = self._norm[0](self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.last(torch.tanh(normal))


def _loss(output: Tensor) -> Tensor:
    return output.square().mean()


class _MixesPositions(nn.Module):
    """An activation whose gradient arrives transposed, while its input lies as it was made."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(16, 16), nn.Linear(32, 32)
        self._activation = [activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self._activation[0](self.first(x)).transpose(1, 2))


ACTIVATIONS = [F.softplus, F.hardtanh, F.elu, F.hardswish, F.hardsigmoid, F.mish, F.leaky_relu]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_backward_of_an_activation_by_a_transposed_gradient(
    activation: Callable[[Tensor], Tensor],
) -> None:
    """The planned step runs, with eager's bits; stand-ins of some such gradients lie otherwise."""
    x = torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plan = optimize(_MixesPositions(activation), x, budget_gb=1, loss_fn=_loss)
    assert_same_training(
        lambda: _MixesPositions(activation), plan.apply, lambda _seed: x, loss_fn=_loss, steps=1
    )


@pytest.mark.parametrize("name", NORMS)
def test_normalization_over_a_transposed_input(name: str) -> None:
    """The planned step runs, with eager's bits."""
    x = torch.randn(8, 32, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plan = optimize(_Transposed(NORMS[name]), x, budget_gb=1, loss_fn=_loss)
    assert_same_training(
        lambda: _Transposed(NORMS[name]), plan.apply, lambda _seed: x, loss_fn=_loss, steps=1
    )


def test_strides_are_the_kernels_own() -> None:
    """Batch normalization of a transposed tensor is contiguous on the CPU, in each capture call."""
    x = torch.randn(8, 32, 16)
    fake_mode = FakeTensorMode()
    repeated = FakeCallCache(fake_mode, RealResults(fake_mode, torch.device("cpu")))
    real = aten.native_batch_norm.default(
        x.transpose(1, 2), None, None, None, None, True, 0.1, 1e-5
    )
    with fake_mode:
        given = fake_mode.from_tensor(x).transpose(1, 2)
        for _ in range(2):
            said = repeated.run(
                aten.native_batch_norm.default, (given, None, None, None, None, True, 0.1, 1e-5), {}
            )
            assert [t.stride() for t in said] == [t.stride() for t in real]


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.pow.Scalar, (2, torch.rand(16, 24).t())),
        (aten.xlogy.Tensor, (torch.rand(16, 24).t(), torch.rand(24, 16))),
        (aten.copysign.Tensor, (torch.rand(16, 24).t(), torch.rand(24, 16))),
        (aten.mul.Tensor, (torch.rand(16, 24).t(), torch.rand(24, 16))),
        (aten.add.Tensor, (torch.rand(2, 8, 1, 1), TWO_FORMATS)),
        (aten.gelu.default, (TWO_FORMATS,)),
        (aten.add.Scalar, (TWO_FORMATS, 1)),
    ],
    ids=["pow", "xlogy", "copysign", "mul", "add", "gelu", "add_number"],
)
def test_elementwise_results_lie_as_the_kernels_own(func: object, args: tuple) -> None:
    """PyTorch's formulas for stand-ins know the strides of some such calls wrongly."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    repeated = FakeCallCache(fake_mode, RealResults(fake_mode, torch.device("cpu")))
    with fake_mode:
        given = tuple(fake_mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        said = repeated.run(func, given, {})
    assert said.stride() == func(*args).stride()  # type: ignore[operator]


def test_nothing_runs_for_contiguous_arguments() -> None:
    """A model whose activations are contiguous costs no run of a kernel while it is traced."""
    fake_mode = FakeTensorMode()
    real = RealResults(fake_mode, torch.device("cpu"), too_long=lambda _call: 1 / 0)  # type: ignore[arg-type,return-value]
    repeated = FakeCallCache(fake_mode, real)
    with fake_mode:
        given = torch.empty(4, 8)
        repeated.run(aten._softmax.default, (given, 1, False), {})
        with pytest.raises(ZeroDivisionError):
            repeated.run(aten._softmax.default, (given.t(), 1, False), {})


def test_calls_that_take_too_long_are_left() -> None:
    """Such a call keeps the strides that PyTorch says."""
    fake_mode = FakeTensorMode()
    repeated = FakeCallCache(
        fake_mode, RealResults(fake_mode, torch.device("cpu"), too_long=lambda _call: True)
    )
    with fake_mode:
        given = torch.empty(7, 31, 15).transpose(1, 2)
        said = repeated.run(
            aten.native_batch_norm.default, (given, None, None, None, None, True, 0.1, 1e-5), {}
        )
    assert said[0].stride() == given.stride()


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mse_loss.default, (torch.rand(32, 8), torch.rand(32, 8))),
        (aten.binary_cross_entropy.default, (torch.rand(32, 8), torch.rand(32, 8))),
        (aten.col2im.default, (torch.rand(1, 9, 64), [8, 8], [3, 3], [1, 1], [1, 1], [1, 1])),
    ],
    ids=["mse_loss", "binary_cross_entropy", "col2im"],
)
def test_memory_is_as_large_as_the_kernels_own(func: object, args: tuple) -> None:
    """A result that was resized keeps its memory, and so does its stand-in."""
    real = func(*args).untyped_storage().nbytes()  # type: ignore[operator]
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    repeated = FakeCallCache(fake_mode, RealResults(fake_mode, torch.device("cpu")))
    with fake_mode:
        given = tuple(fake_mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        for _ in range(2):
            assert repeated.run(func, given, {}).untyped_storage().nbytes() == real


class Enlarged(nn.Module):
    """A position embedding that is brought to the size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 256, 8))
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.table.reshape(1, 16, 16, 8).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(4, 4), mode="bilinear")
        return self.last(x + grid.flatten(2).permute(0, 2, 1))


def test_views_have_the_strides_of_real_ones_where_a_size_is_one() -> None:
    """A kernel that asks them for its memory format copies, or does not."""
    model = Enlarged().train()
    x = torch.randn(2, 16, 8)
    plan = optimize(model, x, budget_gb=1, loss_fn=torch.sum)
    measured = measure(plan.apply(model), x, loss_fn=torch.sum, repeats=0).peak_bytes
    assert abs(plan.predicted_peak_bytes - measured) <= 64


class OnePixel(nn.Module):
    """Attention's layout and a convolution's meet where a picture has become one element."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 64, 4), nn.Conv2d(64, 8, 1)
        self.mix, self.norm = nn.Linear(64, 64), nn.BatchNorm2d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        mixed = self.mix(h.permute(0, 2, 3, 1).reshape(-1, 64)).reshape(-1, 1, 1, 64)
        return self.last(self.norm(h + mixed.permute(0, 3, 1, 2)))


class _Strides(TorchDispatchMode):
    """Notes the strides of what normalizations of batches are given."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if "batch_norm" in str(func):
            self.met += [a.stride() for a in args if isinstance(a, Tensor) and a.dim() == 4]
        return func(*args, **(kwargs or {}))


def test_normalizations_of_one_pixel_are_given_eagers_strides() -> None:
    """By them a normalization chooses its kernel, whose last bits are its own."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    met = []
    for planned in (False, True):
        torch.manual_seed(0)
        model = OnePixel().train()
        if planned:
            optimize(model, x, budget_gb=1, loss_fn=_loss).apply(model)
        with _Strides() as strides:
            _loss(model(x)).backward()
        met.append(strides.met)
    assert met[0]
    assert met[0] == met[1]
