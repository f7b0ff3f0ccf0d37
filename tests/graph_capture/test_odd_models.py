"""Models that nobody here wrote, and modules that do odd things: bits, budget and refusals."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from graph_capture.errors import CaptureError
from graph_capture.loop.loss import LossSource
from planner import InfeasibleBudgetError, Plan, measure, optimize

from .odd import ODD, WIDTH, Three, mean_square, normal, sample
from .transformers_zoo import TRANSFORMERS, LossOf


def _plan(make: Callable[[], nn.Module], example: Any, loss_fn: Any, budget_bytes: int) -> Plan:
    torch.manual_seed(0)
    model = make()
    options: dict[str, Any] = {"loss_fn": loss_fn, "time_limit_s": 0.5}
    try:
        return optimize(model, example, budget_bytes=budget_bytes, **options)
    except InfeasibleBudgetError as error:
        return optimize(model, example, budget_bytes=error.min_budget_bytes, **options)


def _check(
    make: Callable[[], nn.Module],
    samples: Callable[[int], Any],
    loss_fn: Any,
    shares: Sequence[float] = (0.5, 0.0),
) -> None:
    """Bits and peak at shares of the way from resident to baseline; the least budget at zero."""
    whole = _plan(make, samples(0), loss_fn, 10**12)
    resident_bytes = whole.graph.resident_bytes
    for share in shares:
        room_bytes = int(share * (whole.baseline_peak_bytes - resident_bytes))
        plan = _plan(make, samples(0), loss_fn, resident_bytes + max(1, room_bytes))
        planned = assert_same_training(make, plan.apply, samples, loss_fn=loss_fn)
        measured = measure(planned, samples(0), loss_fn=loss_fn, repeats=0)
        assert measured.peak_bytes <= plan.budget_bytes
        # 1 kB: these modules are so small that one scratch buffer is more than 1 %.
        assert measured.peak_bytes == pytest.approx(plan.predicted_peak_bytes, rel=0.01, abs=1000)


_SLOW = {
    *("Recurrences", "ManyDropouts", "Factorized", "GradientPenalty", "SlicesAssigned"),
    *("Checkpointed", "Bags"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in _SLOW else ()) for n in ODD]
)
def test_odd_modules_train_the_same_within_their_budget(name: str) -> None:
    """Each odd module trains to the same bits, within its budget, with the peak predicted."""
    _check(ODD[name], sample(name), mean_square)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_train_the_same_within_their_budget(name: str) -> None:
    """Each model of Transformers trains to the same bits, within its budget, as predicted."""
    make, samples, loss = TRANSFORMERS[name]
    _check(make, samples, None if loss is LossOf.MODEL else mean_square, shares=(0.0,))


def _refused(model: nn.Module, *, loss_fn: Any = mean_square) -> str:
    with pytest.raises(CaptureError) as caught:
        optimize(model.train(), normal(0, 16, WIDTH), budget_bytes=10**9, loss_fn=loss_fn)
    assert not any("FakeTensor" in type(p).__name__ for p in model.parameters())
    return str(caught.value)


class BranchOnValue(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if float(h.sum()) > 0:
            h = h * 2
        return self.c(h)


class Conditional(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(torch.cond(h.sum() > 0, lambda t: t * 2, lambda t: t, (h,)))


def test_an_operator_that_takes_functions_is_refused_by_its_name() -> None:
    """The message says what to write instead."""
    message = _refused(Conditional())
    assert "cond is an operator that takes functions" in message
    assert "test_odd_models.py:" in message


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.7 * x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_function_is_said_to_have_two_gradients() -> None:
    """Eager itself rounds otherwise after the first calls."""

    class Scripted(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(scripted(self.a(x)))

    scripted = torch.jit.script(swish)
    call = type(scripted).__call__
    with pytest.warns(UserWarning, match="forward calls swish, a function of TorchScript"):
        optimize(Scripted().train(), normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square)
    assert type(scripted).__call__ is call


class ShapeFromValue(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(h[h[:, 0] > 0])


@pytest.mark.parametrize("cls", [BranchOnValue, ShapeFromValue])
def test_a_branch_on_a_value_is_refused_by_its_line(cls: type[nn.Module]) -> None:
    """A branch or shape that hangs on a value is refused with its line and the way out."""
    message = _refused(cls())
    assert "test_odd_models.py:" in message
    assert "in forward" in message
    assert "torch.where" in message


class OwnGenerator(Three):
    def forward(self, x: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(3)
        return self.c(self.a(x) + torch.randn(16, WIDTH, generator=own))


class SeedsItself(Three):
    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(3)
            noise = torch.randn(16, WIDTH)
        return self.c(self.a(x) + noise)


class PythonDraws(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * random.random())


class NumpyDraws(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * float(np.random.rand()))


class AnotherThreadDraws(Three):
    num_drawn = 3

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(x))
        other = threading.Thread(target=torch.rand, args=(self.num_drawn,))
        other.start()
        other.join()
        return self.c(h)


class AnotherThreadDrawsMuch(AnotherThreadDraws):
    num_drawn = 100_000


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (AnotherThreadDraws, "another thread draws"),
        (AnotherThreadDrawsMuch, "another thread draws"),
        (OwnGenerator, "generator of the model's own"),
        (SeedsItself, "seeds the random generator"),
        (PythonDraws, "Python's or NumPy's"),
        (NumpyDraws, "Python's or NumPy's"),
    ],
)
def test_numbers_from_elsewhere_are_refused(cls: type[nn.Module], reason: str) -> None:
    """Random numbers that a plan could not draw again as eager does are refused."""
    assert reason in _refused(cls())


def test_refusing_leaves_the_generators_alone() -> None:
    """After a refusal Python's, NumPy's and torch's generators stand where they stood."""
    models = NumpyDraws(), PythonDraws()
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
    for model in models:
        _refused(model)
    assert (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()) == before


def test_a_sparse_gradient_is_refused_by_its_option() -> None:
    """A sparse embedding is refused, and the message names the option to turn off."""

    class Sparse(Three):
        def prepare(self) -> None:
            self.table = nn.Embedding(16, WIDTH, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.table(torch.arange(16)))

    message = _refused(Sparse())
    assert "sparse=True" in message
    assert "test_odd_models.py:" in message


class SideDoor(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.penalty = h.pow(2).mean()
        return self.c(h)


def test_a_loss_through_an_attribute_is_refused() -> None:
    """A loss that reads what forward left on the module would lose that gradient: refused."""
    model = SideDoor()
    message = _refused(model, loss_fn=lambda out: out.mean() + model.penalty)
    assert "return it from forward" in message
    assert not hasattr(model, "penalty")


def test_a_loss_with_weight_decay_is_planned() -> None:
    """A loss that reads parameters themselves is no side door."""
    model = Three()
    plan = optimize(
        model,
        normal(0, 16, WIDTH),
        budget_bytes=10**9,
        loss_fn=lambda out: out.mean() + 1e-3 * model.a.weight.pow(2).sum(),
    )
    assert plan.loss.region.source is LossSource.LOSS_FN


class Grows(Three):
    def prepare(self) -> None:
        self.register_buffer("seen", torch.zeros(0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x])
        return self.c(self.a(x))


class CarriesGraph(Three):
    def prepare(self) -> None:
        self.register_buffer("state", torch.zeros(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.a(x) + self.state
        return self.c(self.state)


class RegistersLater(Three):
    def prepare(self) -> None:
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.ones(WIDTH)
        return self.c(self.a(x) * self.scale)


class ResizesBuffer(Three):
    def prepare(self) -> None:
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.scale.shape != (WIDTH,):
            self.scale.resize_(WIDTH).fill_(2.0)
        return self.c(self.a(x) * self.scale)


class ReshapesArgument(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x.unsqueeze_(0)))


class SparseBuffer(Three):
    def prepare(self) -> None:
        self.register_buffer("graph", torch.eye(16).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.graph, self.c(self.a(x)))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ResizesBuffer, "'scale', a float32[1] on cpu, another shape or layout in place"),
        (ReshapesArgument, "work on a view"),
        (SparseBuffer, "buffer 'graph' is a tensor of layout torch.sparse_coo"),
        (Grows, "need another plan"),
        (CarriesGraph, "detach it"),
        (RegistersLater, "run the model once before"),
    ],
)
def test_state_that_no_plan_can_follow_is_refused(cls: type[nn.Module], reason: str) -> None:
    """One that grows, is resized, is sparse, carries a graph or appears late: with the way out."""
    assert reason in _refused(cls())


class ResizesResult(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.empty(0).resize_(16, WIDTH).copy_(self.a(x)))


class OutOfAnotherSize(Three):
    def forward(self, x: Tensor) -> Tensor:
        doubled = torch.empty(0)
        torch.mul(x, 2, out=doubled)
        return self.c(self.a(doubled))


class Nests(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.nested.nested_tensor([x[:4], x[4:]]).to_padded_tensor(0.0))


class MultipliesSparse(Three):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(16).expand(2, 16)
        return torch.sparse_coo_tensor(places, x[:, 0], (16, 16)) @ self.c(self.a(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ResizesResult, "is resized in place to (16, 32)"),
        (OutOfAnotherSize, "leave out= away"),
        (Nests, "pad instead"),
        (MultipliesSparse, "make it dense"),
    ],
)
def test_tensors_that_no_graph_holds_are_refused(cls: type[nn.Module], reason: str) -> None:
    """Resized, nested and sparse ones are refused with what to do instead."""
    assert reason in _refused(cls())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated")
def test_a_script_module_is_refused_unharmed() -> None:
    """A TorchScript part is refused by name, and its weights are still real tensors."""
    model = Three()
    model.b = torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(2, WIDTH))
    assert "'b' is a TorchScript module" in _refused(model)
    assert type(model.b.weight.data) is Tensor


def test_a_module_that_fails_in_eager_says_so() -> None:
    """A model that breaks its own backward is refused with the question whether eager runs."""

    class Broken(Three):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.a(x))
            y = self.b(h)
            h.mul_(2)
            return y

    assert "unplanned training step" in _refused(Broken())


def test_what_a_module_keeps_makes_no_other_plan() -> None:
    """A tensor that forward leaves on a module is resident from the first plan on, the only one."""

    class Keeps(Three):
        def forward(self, x: Tensor) -> Tensor:
            self.last = self.a(x).detach()
            return self.c(self.last + self.b(x))

    x = normal(0, 16, WIDTH)
    fresh, used = Keeps(), Keeps()
    plan = optimize(fresh, x, budget_bytes=10**9, loss_fn=mean_square)
    used(x)
    again = optimize(used, x, budget_bytes=10**9, loss_fn=mean_square)
    held = "held by modules"
    assert [s.size_bytes for s in plan.graph.storages if s.name == held] == [16 * WIDTH * 4]
    assert again.graph.resident_bytes == plan.graph.resident_bytes
    assert again.fingerprint == plan.fingerprint
    plan.apply(used)


class Counts(Three):
    def prepare(self) -> None:
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.c(self.a(x) / self.step)


class RemembersLength(Three):
    def prepare(self) -> None:
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        self.length = x.shape[0]
        return self.c(self.a(x) / self.length)


def test_a_count_in_python_is_refused() -> None:
    """A number on a module that changes with each forward is refused by its name."""
    model = Counts()
    assert "counts in attribute 'step'" in _refused(model)
    assert model.step == 0


def test_a_number_that_settles_is_no_count() -> None:
    """A number that forward sets to the same each time is captured."""
    _check(RemembersLength, sample("Three"), mean_square)


class _Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class UsesCache(Three):
    def forward(self, x: Tensor, cache: Any) -> Tensor:
        h = self.a(x)
        cache.keys.append(h)
        return self.c(h)


def test_an_object_that_collects_tensors_is_refused() -> None:
    """A cache that forward fills is refused as an argument, and is empty afterwards."""
    cache = _Cache()
    with pytest.raises(CaptureError, match=r"_Cache holds tensors.*use_cache=False"):
        optimize(
            UsesCache(), (normal(0, 16, WIDTH), cache), budget_bytes=10**9, loss_fn=mean_square
        )
    assert cache.keys == []
