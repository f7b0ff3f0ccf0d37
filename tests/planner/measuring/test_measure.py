"""The measuring tool against figures that one can compute by hand."""

from __future__ import annotations

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.testing.bitwise import assert_same_tensors
from benchmarks.testing.zoo import (
    ZOO,
    cases,
)
from planner import optimize
from planner.base.resident import (
    resident_tensors,
    storage_bytes,
)
from planner.base.training_step import (
    make_step,
    train_step,
)
from planner.measuring.measure import (
    PairedTiming,
    measure,
    measure_pair,
    peak_extra_bytes,
    quartiles,
)

FLOAT = 4
CPU = torch.device("cpu")


def profiler_peak_bytes(call) -> int:
    """Peak of torch.profiler's own memory events, the public way to the same record."""
    # torch 2.11 warns where events are not kept over cycles, though there is one only.
    kept = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with profile(**kept) as prof:
        returned = call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    del returned
    return max(itertools.accumulate(e.nbytes() for e in events))


def test_the_record_of_an_addition_is_its_output():
    """One addition of two tensors of 1,000 floats allocates 4,000 bytes."""
    a, b = torch.ones(1000), torch.ones(1000)
    assert peak_extra_bytes(lambda: a + b) == 1000 * FLOAT


def test_a_freed_temporary_counts_while_it_is_alive():
    """y and z are alive together, then y goes, then w comes: two at the peak."""
    a = torch.ones(1000)

    def call() -> Tensor:
        y = torch.sin(a)
        z = torch.cos(y)
        del y
        return torch.sin(z)

    assert peak_extra_bytes(call) == 2 * 1000 * FLOAT


def test_a_view_allocates_nothing():
    """A transposed view is free."""
    a = torch.ones(10, 10)
    assert peak_extra_bytes(lambda: a.t()) == 0


def test_scratch_inside_a_kernel_is_seen():
    """oneDNN's convolution holds more than its output while it runs."""
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False).requires_grad_(False)
    x = torch.ones(2, 16, 32, 32)
    assert peak_extra_bytes(lambda: conv(x)) > x.nbytes


def test_linear_step_by_hand():
    """A bias-free linear layer under a weighted sum: every byte is named."""
    batch, inputs, outputs = 64, 32, 16
    model = nn.Linear(inputs, outputs, bias=False)
    x, weights = torch.randn(batch, inputs), torch.randn(batch, outputs)

    def loss_fn(y: Tensor) -> Tensor:
        return (y * weights).sum()

    weight, output = inputs * outputs * FLOAT, batch * outputs * FLOAT
    resident = weight + x.nbytes + weights.nbytes
    # y, the loss and its gradient of ones, the gradient of y, the weight's gradient;
    # y * weights is gone once it is summed.
    peak = resident + output + FLOAT + FLOAT + output + weight
    measured = measure(model, x, loss_fn=loss_fn, repeats=0)
    assert (measured.resident_bytes, measured.peak_bytes) == (resident, peak)


def test_outputs_of_a_step_without_a_loss_get_gradients_of_ones():
    """Without a loss the ones that start the backward pass are as large as the output."""
    model = nn.Linear(8, 512, bias=False)
    x = torch.randn(4, 8)
    output, weight = 4 * 512 * FLOAT, 8 * 512 * FLOAT
    measured = measure(model, x, repeats=0)
    assert measured.peak_bytes == x.nbytes + weight + output + output + weight


@pytest.mark.parametrize(
    "case",
    [
        *cases("tiny", "gpt2", "t5", "resnet50", "unet", "convnext", "lstm", "mlp_bf16"),
        *(
            pytest.param(*param.values, id=f"{param.id}-small", marks=pytest.mark.slow)
            for param in cases("small", "bert", "llama", "vit", "transformer_encoder")
        ),
    ],
)
def test_peak_is_that_of_the_profiler(case):
    """The recorder and torch.profiler hear the same reports."""
    model, sample = case.make(), case.sample(0)
    with case.context():
        measured = measure(model, sample, loss_fn=case.loss_fn, repeats=0)
        peak = profiler_peak_bytes(make_step(model, sample, loss_fn=case.loss_fn, seed=0))
    assert measured.peak_bytes - measured.resident_bytes == peak


@pytest.mark.parametrize("name", ["gpt2", "resnet50", "many_outputs", "mlp_bf16"])
def test_measuring_again_gives_the_same_bytes(name):
    """The record does not depend on what was measured before, nor on Python's garbage."""
    case = ZOO[name]("tiny")
    model, sample = case.make(), case.sample(0)
    with case.context():
        first, second = (
            measure(model, sample, loss_fn=case.loss_fn, optimizer="adamw", repeats=1)
            for _ in range(2)
        )
    assert (first.peak_bytes, first.resident_bytes) == (second.peak_bytes, second.resident_bytes)


def test_optimizer_state_is_resident():
    """AdamW adds two floats for each parameter and a step counter for each tensor."""
    model = nn.Linear(32, 16)
    x = torch.randn(4, 32)
    none, adamw, sgd = (
        measure(model, x, loss_fn=torch.sum, optimizer=o, repeats=0) for o in (None, "adamw", "sgd")
    )
    parameters = (32 * 16 + 16) * FLOAT
    assert none.resident_bytes == parameters + x.nbytes
    assert adamw.resident_bytes == none.resident_bytes + 2 * parameters + 2 * FLOAT
    assert sgd.resident_bytes == none.resident_bytes


def test_tied_weights_and_shared_inputs_count_once():
    """A storage under two names is one storage."""
    layer = nn.Linear(8, 8, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(2, 8)
    tensors = resident_tensors(model, (x, x[:1]))
    assert storage_bytes(tensors, CPU) == 8 * 8 * FLOAT + x.nbytes


_CACHE: dict[int, torch.Tensor] = {}


class Cached(nn.Module):
    """Adds a table that lies in no module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + _CACHE.setdefault(8, torch.linspace(0, 1, 64 * 8).reshape(64, 8)))


def test_what_a_plan_knows_of_that_lies_elsewhere_counts():
    """A table in a global is there while the planned step runs, as its plan says."""
    model, x = Cached(), torch.randn(64, 8)
    model(x)
    plan = optimize(model, x, budget_gb=1, loss_fn=torch.sum)
    measured = measure(plan.apply(model), x, loss_fn=torch.sum, repeats=0)
    assert abs(measured.peak_bytes - plan.predicted_peak_bytes) <= 2 * FLOAT  # of 11 kB


def test_gradients_that_were_there_do_not_count():
    """A step begins with gradients set to None, so old ones are not resident."""
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    before = measure(model, x, loss_fn=torch.sum, repeats=0)
    train_step(model, x, torch.sum)
    assert measure(model, x, loss_fn=torch.sum, repeats=0).peak_bytes == before.peak_bytes


def test_gradients_of_inputs_and_of_a_loss_module_count_and_are_put_back():
    """An input that requires grad costs its gradient, and so do a loss module's parameters."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1000))

        def forward(self, y: Tensor) -> Tensor:
            return y @ self.scale

    x = torch.ones(1000, requires_grad=True)
    x.grad = torch.full((1000,), 7.0)
    loss_fn = Loss()
    measured = measure(nn.Identity(), x, loss_fn=loss_fn, repeats=1)
    assert measured.resident_bytes == 2 * 1000 * FLOAT
    # the loss, its gradient of ones, and two gradients
    assert measured.peak_bytes == measured.resident_bytes + 2 * FLOAT + 2 * 1000 * FLOAT
    assert x.grad[0] == 7
    assert loss_fn.scale.grad is None


class Counting(nn.Module):
    """Changes a buffer in place, another by assignment, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(nn.functional.dropout(self.linear(x), 0.5))
        self.total += y.detach().sum(0)
        self.last = y.detach().mean(0)
        return y.square().mean()


class Drawing(nn.Module):
    """Draws from Python's and NumPy's generators, as a layer drop does."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * (random.random() + float(np.random.rand()))).sum()


def test_python_s_and_numpy_s_generators_are_put_back() -> None:
    """The training loop goes on with the numbers that it would have drawn."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    measure(Drawing(), torch.ones(2, requires_grad=True), repeats=0)
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state()))


@pytest.mark.parametrize("optimizer", [None, "adamw", "fresh instance", "used instance"])
def test_everything_is_put_back(optimizer):
    """Parameters, buffers, gradients, optimizer state and the generator are as before."""
    model, x = Counting(), torch.randn(8, 4)
    if optimizer and "instance" in optimizer:
        kind = optimizer
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        train_step(model, x)
        if kind == "used instance":
            optimizer.step()

    def everything() -> dict:
        seen = {name: t.clone() for name, t in model.state_dict().items()}
        seen |= {f"grad {n}": copy.deepcopy(p.grad) for n, p in model.named_parameters()}
        if isinstance(optimizer, torch.optim.Optimizer):
            for i, state in optimizer.state_dict()["state"].items():
                seen |= {f"state {i} {k}": copy.deepcopy(v) for k, v in state.items()}
        seen["generator"] = torch.get_rng_state()
        return seen

    before = everything()
    objects = [id(t) for t in (*model.buffers(), *(p.grad for p in model.parameters()))]
    measure(model, x, optimizer=optimizer, repeats=2, seed=5)
    assert_same_tensors(before, everything(), "after measuring")
    now = [id(t) for t in (*model.buffers(), *(p.grad for p in model.parameters()))]
    assert now == objects


class Normalized(nn.Module):
    """Forward keeps its weight's rows at length one, past autograd and its versions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 17).view(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.copy_(nn.functional.normalize(self.weight.data, dim=1))
        return (x @ self.weight).square().mean()


def test_parameters_that_forward_writes_to_are_put_back():
    """Measuring and validating leave them as they were, without an optimizer as well."""
    model, x = Normalized(), torch.randn(8, 4)
    before = model.weight.detach().clone()
    measure(model, x, repeats=1)
    assert torch.equal(model.weight, before)
    optimize(model, x, budget_gb=1).validate(model, x, repeats=0)
    assert torch.equal(model.weight, before)


def test_what_was_there_is_put_back_after_an_error():
    """A step that fails halfway leaves no trace either."""
    model, x = Counting(), torch.randn(8, 4)
    before = copy.deepcopy(model.state_dict())

    def fail(loss: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        measure(model, x, loss_fn=fail)
    assert_same_tensors(dict(before), dict(model.state_dict()), "after the error")
    assert peak_extra_bytes(lambda: torch.ones(10)) == 10 * FLOAT


def test_times_come_in_microseconds_one_for_each_repeat():
    """The median lies among the repeats; without repeats there is none."""
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    measured = measure(model, x, repeats=3)
    assert len(measured.step_us_all) == 3
    assert measured.step_us == sorted(measured.step_us_all)[1] > 0
    assert math.isnan(measure(model, x, repeats=0).step_us)


def test_pairs_alternate():
    """First and second change places from pair to pair, after the warm-up."""
    calls: list[str] = []
    timing = measure_pair(lambda: calls.append("a"), lambda: calls.append("b"), repeats=4, warmup=1)
    assert "".join(calls) == "ab" + "abbaabba"
    assert len(timing.ratios) == 4
    assert min(timing.ratios) <= timing.ratio <= max(timing.ratios)


@pytest.mark.parametrize(("repeats", "calls"), [(1, "abba"), (3, "abbaabba"), (4, "abbaabba")])
def test_each_goes_first_equally_often(repeats, calls):
    """An odd number of pairs is rounded up; the warm-up changes places, too."""
    heard: list[str] = []
    pair = lambda: heard.append("a"), lambda: heard.append("b")
    timing = measure_pair(*pair, repeats=repeats, warmup=2)
    assert "".join(heard) == "abba" + calls
    assert len(timing.ratios) == len(calls) // 2


def test_quartiles_are_those_of_the_table():
    """Printed quartiles lie between the ratios themselves, and one pair has them, too."""
    one = PairedTiming(first_us=(2.0,), second_us=(3.0,))
    assert str(one) == "ratio 1.500 (quartiles 1.500 to 1.500, 1 pairs)"
    two = PairedTiming(first_us=(1.0, 1.0), second_us=(1.0, 2.0))
    assert str(two) == "ratio 1.500 (quartiles 1.250 to 1.750, 2 pairs)"
    assert all(math.isnan(q) for q in quartiles(()))


def test_a_slower_callable_has_a_ratio_above_one():
    """Eight times the work takes longer."""
    a, b = torch.randn(64, 64), torch.randn(512, 512)
    assert measure_pair(lambda: a @ a, lambda: b @ b, repeats=5).ratio > 1


@pytest.mark.parametrize("device", ["meta"])
def test_a_device_without_memory_is_refused(device):
    """There is no real step on the meta device."""
    with pytest.raises(ValueError, match="cannot be measured on device 'meta'"):
        measure(nn.Linear(2, 2, device=device), torch.ones(2, 2, device=device))


@pytest.mark.gpu
def test_cuda_linear_step_by_hand():
    """On CUDA the large blocks alone give the peak to within cuBLAS' workspace."""
    model = nn.Linear(1024, 1024, bias=False, device="cuda")
    x = torch.randn(2048, 1024, device="cuda")
    weight, output = 1024 * 1024 * FLOAT, 2048 * 1024 * FLOAT
    measured = measure(model, x, repeats=1)
    expected = weight + x.nbytes + output + output + weight
    assert expected <= measured.peak_bytes <= expected + 2**26
    assert measured.reserved_bytes is not None


def test_an_expanded_input_is_left_as_it_was() -> None:
    """An input whose rows share memory is measured, and gradients come back."""
    layer = torch.nn.Linear(8, 2)
    x = torch.randn(1, 8).expand(4, 8)
    layer.weight.grad = gradient = torch.ones_like(layer.weight)
    before = layer.weight.detach().clone()
    measure(layer, x, loss_fn=torch.sum, optimizer="sgd", repeats=1)
    assert layer.weight.grad is gradient
    assert torch.equal(layer.weight, before)


def test_a_closure_whose_variable_has_no_value_yet_carries_nothing() -> None:
    """A variable that is bound after the function was made is no tensor yet."""

    def loss_fn(output: Tensor) -> Tensor:
        return output.sum() if output.numel() else later

    held = resident_tensors(nn.Linear(2, 2), torch.ones(1, 2), loss_fn=loss_fn)
    assert len(held) == 3  # weight, bias, input
    later = None


class _Counting(nn.Linear):
    """Counts its calls in Python, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last = x.detach()
        return super().forward(x)


def test_counters_in_python_are_put_back() -> None:
    """Plain attributes and lists of a module are after a measurement what they were."""
    model = _Counting()
    measure(model, torch.ones(1, 2), loss_fn=torch.sum, repeats=1)
    assert (model.calls, model.seen, hasattr(model, "last")) == (0, [], False)


class _Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.7 * x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_submodule_is_measured() -> None:
    """Its tables refuse writes, and nothing needs to be written to them."""
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(_Gate()))
    assert measure(model, torch.randn(2, 4), repeats=0).peak_bytes > 0


class _KeepsLast(nn.Module):
    """Keeps what it saw last in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 32)
        self.last = torch.zeros(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        self.last = h.detach() * 2
        return h


def test_what_earlier_records_saw_changes_no_figure():
    """A tensor that a step lets go of lies where a recorded block lay, and its free counts not."""
    model, x = _KeepsLast(), torch.ones(16, 16)
    before = measure(model, x, repeats=0)
    kept: list[Tensor] = []
    peak_extra_bytes(lambda: kept.extend(torch.zeros(16, 32) for _ in range(2000)))
    kept.clear()  # the allocator gives these addresses out again
    again = [measure(model, x, repeats=0) for _ in range(3)]
    assert [m.peak_bytes for m in again] == [before.peak_bytes] * 3
