"""What forward leaves behind is carried out by a planned step, or refused by its line."""

from __future__ import annotations

import contextvars
import copy
import queue
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from graph_capture import capture
from graph_capture.errors import CaptureError
from planner import optimize

from .. import settings
from ..odd import WIDTH, Three, mean_square, normal, plan_of

FEATURES: list[Tensor] = []

CALLS = 0


class LeavesStatistics(Three):
    """Every kind of effect that can be carried out."""

    def prepare(self) -> None:
        self.scale = torch.ones(())
        self.mean = torch.zeros(WIDTH)
        self.load: Tensor | None = None
        self.seen: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x) * self.scale)
        self.scale = h.detach().abs().mean()
        self.mean.lerp_(h.detach().mean(0), 0.5)
        self.load = h.detach().gt(0).sum(0)
        self.seen = tuple(x.shape)
        return self.c(self.b(h))


def test_attributes_are_what_eager_leaves() -> None:
    """Read and replaced, written in place, only written, plain values: eager's in every step."""
    torch.manual_seed(0)
    eager = LeavesStatistics().train()
    planned = copy.deepcopy(eager)
    plan_of(planned).apply(planned)
    for seed in range(3):
        for model in (eager, planned):
            mean_square(model(normal(seed, 16, WIDTH))).backward()
        assert torch.equal(eager.scale, planned.scale)
        assert torch.equal(eager.mean, planned.mean)
        assert torch.equal(eager.load, planned.load)  # type: ignore[arg-type]
        assert eager.seen == planned.seen == (16, WIDTH)
        for a, b in zip(eager.parameters(), planned.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_planning_leaves_the_attributes_alone() -> None:
    """Nothing of a capture stays on the module."""
    model = LeavesStatistics().train()
    scale, mean = model.scale, model.mean
    plan_of(model)
    assert model.scale is scale
    assert model.mean is mean
    assert model.load is None
    assert model.seen == ()


class Accumulates(Three):
    def prepare(self) -> None:
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        load = h.detach().sum(0)
        self.load = load if self.load is None else self.load + load
        return self.c(h)


class Appends(Three):
    def prepare(self) -> None:
        self.kept: Any = {"list": []}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.kept["list"].append(h.detach().mean())
        return self.c(h)


class AuxiliaryLoss(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.auxiliary = h.pow(2).mean()
        return self.c(h)


class FillsGlobal(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        FEATURES.append(h)
        return self.c(h)


class CountsGlobally(Three):
    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return self.c(self.a(x))


class Tracker:
    def __init__(self) -> None:
        self.history: list[Tensor] = []


class FillsObject(Three):
    def prepare(self) -> None:
        self.tracker = Tracker()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.tracker.history.append(h.detach())
        return self.c(h)


class AppendsNumbers(Three):
    def prepare(self) -> None:
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.c(self.a(x))


class FirstCall(Three):
    def prepare(self) -> None:
        self.initialized = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not self.initialized:
            h = h * 2
            self.initialized = True
        return self.c(h)


def hooked() -> nn.Module:
    model = Three()
    features: list[Tensor] = []
    model.b.register_forward_hook(lambda _module, _args, out: features.append(out))
    return model


class Reported(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: nn.Module) -> Tensor:
        ctx.owner = owner
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.owner.norm = gradients[0].norm()
        return gradients[0], None


class ReportsInBackward(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(Reported.apply(self.a(x), self))


def hooked_in_backward() -> nn.Module:
    model = Three()
    norms: list[Tensor] = []
    model.b.register_full_backward_hook(lambda _m, _grads, out: norms.append(out[0].norm()))
    return model


def counted_in_backward() -> nn.Module:
    model = Three()
    calls: list[int] = []
    model.b.register_full_backward_hook(lambda *_: calls.append(1))
    return model


class WritesGraph(Three):
    def prepare(self) -> None:
        self.register_buffer("state", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.state.add_(h.mean(0))
        return self.c(h + self.state)


SPACE = types.SimpleNamespace(last=None)

QUEUE: queue.Queue[Any] = queue.Queue()

OF_THREAD = threading.local()

CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("CONTEXT", default=None)

WEAKLY: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def noted(x: Tensor) -> Tensor:
    return x


class FillsOther(Three):
    """Leaves what it computes in an object that is no module."""

    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(noted(x))
        self.fill(h.detach())
        return self.c(h)

    def fill(self, h: Tensor) -> None:
        raise NotImplementedError


def filling(fill: Callable[[Any, Any], Any]) -> Callable[[], nn.Module]:
    return type("Fills", (FillsOther,), {"fill": fill})


def set_in_file(_model: Any, h: Tensor) -> None:
    settings.LAST = h  # type: ignore[attr-defined]


FILLED = {
    "SPACE": filling(lambda _model, h: setattr(SPACE, "last", h)),
    "Fills.last": filling(lambda model, h: setattr(type(model), "last", h)),
    "settings.LAST": filling(set_in_file),
    "QUEUE": filling(lambda _model, h: QUEUE.put(h)),
    "noted": filling(lambda _model, h: setattr(noted, "last", h)),
    "OF_THREAD": filling(lambda _model, h: setattr(OF_THREAD, "last", h)),
    "CONTEXT": filling(lambda _model, h: CONTEXT.set(h)),
    "WEAKLY": filling(lambda model, h: WEAKLY.__setitem__(model, h)),
}


@pytest.mark.parametrize("place", FILLED)
def test_a_tensor_in_any_other_object_is_refused(place: str) -> None:
    """By its place; and nothing of the attempt stays behind."""
    make: Any = FILLED[place]
    with pytest.raises(CaptureError, match=f"leaves a tensor in .*{place}"):
        plan_of(make())
    assert SPACE.last is CONTEXT.get() is make.last is None
    assert not hasattr(settings, "LAST")
    assert QUEUE.empty()
    assert not vars(noted)
    assert not vars(OF_THREAD)
    assert not WEAKLY


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Accumulates, r"finds None in attribute 'load'.*test_effects.py:\d+.*run the model once"),
        (Appends, r"leaves a tensor in \"?'?kept.*test_effects.py:\d+"),
        (AuxiliaryLoss, r"requires grad in attribute 'auxiliary' \(test_effects.py:\d+\)"),
        (FillsGlobal, r"leaves a tensor in 'FEATURES'"),
        (CountsGlobally, r"counts in attribute 'CALLS'"),
        (FillsObject, r"leaves a tensor in 'tracker.history'"),
        (AppendsNumbers, r"counts in attribute 'sizes'"),
        (FirstCall, r"second call of forward.*'initialized' to True; run the model once"),
        (hooked, r"leaves a tensor in 'features'"),
        (ReportsInBackward, r"backward changes 'norm'"),
        (hooked_in_backward, r"backward changes 'norms'"),
        (counted_in_backward, r"backward changes 'calls'"),
        (WritesGraph, r"writes values that require grad"),
    ],
)
def test_what_a_plan_would_lose_is_refused(make: Callable[[], nn.Module], reason: str) -> None:
    """By its place and line; and nothing of the attempt stays behind."""
    model = make()
    before = {name: copy.copy(value) for name, value in vars(model).items()}
    with pytest.raises(CaptureError, match=reason):
        plan_of(model)
    assert vars(model).keys() == before.keys()
    assert (len(FEATURES), CALLS) == (0, 0)


def test_hooks_on_all_modules_are_refused_for_what_they_leave() -> None:
    """Forward hooks of every module collect outputs, which a planned step would not do."""
    outputs: list[Tensor] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda _module, _args, out: outputs.append(out)
    )
    with handle, pytest.raises(CaptureError, match="leaves a tensor in 'outputs'"):
        plan_of(Three())
    assert outputs == []


@pytest.mark.parametrize("make", [Accumulates, FirstCall])
def test_the_advice_to_run_the_model_once_works(make: Callable[[], nn.Module]) -> None:
    """After one call the second call is like the third, and is planned as eager runs it."""
    torch.manual_seed(0)
    eager = make().train()
    eager(normal(5, 16, WIDTH))
    planned = copy.deepcopy(eager)
    plan_of(planned).apply(planned)
    for seed in range(2):
        outputs = [model(normal(seed, 16, WIDTH)) for model in (eager, planned)]
        assert torch.equal(*outputs)
        mean_square(outputs[1]).backward()
    if isinstance(eager, Accumulates):
        assert torch.equal(eager.load, planned.load)  # type: ignore[arg-type]


class RefillsList(Three):
    """Hands parts of the output on by a list of as many tensors, as MONAI's DynUNet does."""

    def prepare(self) -> None:
        self.heads = [torch.zeros(1)]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.heads[0] = self.b(h)
        return self.c(h) + self.heads[0]


class PutsBack(nn.Module):
    """What the error advises where nobody needs the list after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RefillsList()

    def forward(self, x: Tensor) -> Tensor:
        before = list(self.net.heads)
        out = self.net(x)
        self.net.heads[:] = before
        return out


def test_the_advice_to_put_back_works() -> None:
    """A list of the model's own that is refilled in each call is refused, or a scratchpad."""
    x = normal(0, 16, WIDTH)
    with pytest.raises(CaptureError, match=r"leaves a tensor in 'heads'.*a module around this one"):
        plan_of(RefillsList())
    torch.manual_seed(0)
    plan = optimize(PutsBack().train(), x, budget_bytes=10**9, loss_fn=mean_square)
    assert_same_training(
        lambda: PutsBack().train(),
        plan.apply,
        lambda seed: normal(seed, 16, WIDTH),
        loss_fn=mean_square,
    )


class CachesMask(Three):
    def prepare(self) -> None:
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) != len(x):
            self.mask = torch.triu(torch.ones(len(x), len(x)))
        return self.c(self.mask @ self.a(x))


def test_a_cache_of_constants_is_made_again() -> None:
    """A mask that depends on sizes only is planned without a first call."""
    torch.manual_seed(0)
    eager = CachesMask().train()
    planned = copy.deepcopy(eager)
    plan_of(planned).apply(planned)
    assert torch.equal(*(model(normal(0, 16, WIDTH)) for model in (eager, planned)))


class WritesArgument(Three):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        h = self.a(batch["x"])
        batch["h"] = h.detach()
        return self.c(h)


class PopsArgument(Three):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.c(self.a(batch.pop("x")))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(WritesArgument, r"leaves a tensor in .*batch"), (PopsArgument, "changes its argument")],
)
def test_what_is_written_into_an_argument_is_refused(
    make: Callable[[], nn.Module], reason: str
) -> None:
    """The caller's dict would not have it."""
    batch = {"x": normal(0, 16, WIDTH)}
    with pytest.raises(CaptureError, match=reason):
        plan_of(make(), (batch,))
    assert list(batch) == ["x"]


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, positions: Tensor) -> Tensor:
        positions.requires_grad_()
        return self.b(torch.tanh(self.a(positions))).sum()


def test_an_argument_that_forward_makes_require_grad_gets_its_gradient() -> None:
    """Forces are gradients of an energy by positions."""
    torch.manual_seed(0)
    eager = Forces().train()
    planned = copy.deepcopy(eager)
    plan_of(planned, normal(0, 16, 3), loss_fn=None).apply(planned)
    gradients = []
    for model in (eager, planned):
        positions = normal(1, 16, 3)
        model(positions).backward()
        assert positions.requires_grad
        gradients.append(positions.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_a_step_is_captured_under_anomaly_detection() -> None:
    """What it asks of gradients is no question of the model."""
    with torch.autograd.detect_anomaly():
        assert plan_of(Three()).baseline_peak_bytes > 0
        assert torch.is_anomaly_enabled()


class Settles(nn.Module):
    """Puts another module in the place of one of its own in its first call, as BigBird does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.drop, nn.Identity):
            self.drop = nn.Identity()  # type: ignore[assignment]
        return self.drop(self.first(x))


def test_a_forward_that_exchanges_a_module_is_refused() -> None:
    """The first call is another one than all that follow; after it the model can be planned."""
    model = Settles().train()
    with pytest.raises(CaptureError, match=r"another module in the place of 'drop'.*run the model"):
        capture(model, normal(0, 16, WIDTH), loss_fn=mean_square)
    assert isinstance(model.drop, nn.Dropout)
    model(normal(0, 16, WIDTH))
    capture(model, normal(0, 16, WIDTH), loss_fn=mean_square)


def test_a_lazy_module_is_refused() -> None:
    """Its parameters have no shape before its first call, and the advice works."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh()).train()
    x = normal(0, 16, WIDTH)
    with pytest.raises(CaptureError, match=r"'0.weight' has no shape yet .*run the model once"):
        optimize(model, x, budget_gb=1, loss_fn=mean_square)
    model(x)
    optimize(model, x, budget_gb=1, loss_fn=mean_square)
