"""A step that is broken off, at any operator or moment: the next one is right to the bit."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from planner import Plan, PlanWarning, optimize
from planner.running import generators as random_generators
from tests.planner.small import ROWS, make, plan_for, sample, square


class _Dropouts(nn.Module):
    """Draws that are repeated in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.drop(torch.tanh(layer(x)))
        return x


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan under which draws are repeated."""
    found = plan_for(make(_Dropouts), sample(), share=0.5, loss_fn=square)
    found = optimize(
        make(_Dropouts),
        sample(),
        budget_bytes=found.budget_bytes,
        loss_fn=square,
        always_recompute=("drop",),
        time_limit_s=1,
    )
    assert any("bernoulli" in found.graph.operators[v].target for v in found.schedule.order)
    return found


class _Stop(BaseException):
    """Passes every handler, as KeyboardInterrupt does."""


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    square(model(sample(1))).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _interrupted_at_each(
    model: nn.Module, interrupt: Callable[[int], Callable[[], bool]], expected: list[torch.Tensor]
) -> int:
    """Break the step off at its n-th moment, for every n; returns how many there are."""
    n = 0
    while True:
        model.zero_grad()
        torch.manual_seed(7)
        reached = interrupt(n)
        try:
            square(model(sample(1))).backward()
        except _Stop:
            pass
        finally:
            hit = reached()
        state = torch.get_rng_state()
        assert torch.is_grad_enabled()
        assert not random_generators._REWOUND.undo
        assert any(torch.equal(state, known) for known in _states(expected)), n
        for found, right in zip(_gradients(model), expected, strict=True):
            assert torch.equal(found, right), n
        if not hit:
            return n
        n += 1


_STATES: list[torch.Tensor] = []


def _states(_expected: list[torch.Tensor]) -> list[torch.Tensor]:
    """The generator's states that an eager step goes through."""
    if not _STATES:
        eager = make(_Dropouts)
        torch.manual_seed(7)
        _STATES.append(torch.get_rng_state())
        for _ in range(3):
            torch.empty(ROWS, 32).bernoulli_(0.7)
            _STATES.append(torch.get_rng_state())
        torch.manual_seed(7)
        eager(sample(1))
        assert torch.equal(_STATES[-1], torch.get_rng_state())
    return _STATES


def _in_generated(code: CodeType) -> bool:
    here = random_generators.__file__
    return code.co_filename.startswith("<eval_with_key>") or code.co_filename == here


def test_an_interrupt_at_any_line_leaves_everything_right(plan: Plan) -> None:
    """Every line of generated code and of what rewinds generators is broken off once."""
    model = plan.apply(make(_Dropouts))
    expected = [g.clone() for g in _gradients(make(_Dropouts))]
    _gradients(model)

    def interrupt(n: int) -> Callable[[], bool]:
        left = [n]

        def on_line(frame: FrameType, event: str, _: object) -> Any:
            if event == "line":
                if left[0] == 0:
                    left[0] = -1
                    sys.settrace(None)
                    raise _Stop
                left[0] -= 1
            return on_line

        def on_call(frame: FrameType, event: str, _: object) -> Any:
            inside = _in_generated(frame.f_code) and frame.f_code.co_name not in _UNDOING
            return on_line if inside else None

        sys.settrace(on_call)

        def reached() -> bool:
            sys.settrace(None)
            return left[0] == -1

        return reached

    assert _interrupted_at_each(model, interrupt, expected) > 40


_UNDOING = ("__enter__", "__exit__", "<lambda>")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_in_a_repeated_draw_puts_the_generator_right(
    plan: Plan, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the kernel raises while the generator is rewound."""
    model = plan.apply(make(_Dropouts))
    expected = [g.clone() for g in _gradients(make(_Dropouts))]
    _gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    loss = square(model(sample(1)))
    state = torch.get_rng_state()
    set_state = torch.set_rng_state
    calls = [0]

    def failing(new: torch.Tensor) -> None:
        set_state(new)
        calls[0] += 1
        if calls[0] == 1:
            raise error

    monkeypatch.setattr(torch, "set_rng_state", failing)
    with pytest.raises(error):
        loss.backward()
    monkeypatch.undo()
    assert calls[0] == 2
    assert torch.equal(torch.get_rng_state(), state)
    for found, right in zip(_gradients(model), expected, strict=True):
        assert torch.equal(found, right)


class _Breaking(TorchDispatchMode):
    """Breaks off at the n-th operator that is dispatched."""

    def __init__(self, n: int, how: Callable[[], None]) -> None:
        super().__init__()
        self.left, self._how = n, how

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.left -= 1
        if self.left == -1:
            self._how()
        return func(*args, **(kwargs or {}))


def _raises() -> None:
    raise _Stop


def _press() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        signal.raise_signal(signal.SIGINT)  # as Ctrl-C is delivered
        for _ in range(1_000):  # until the interpreter looks whether a signal has arrived
            pass
    finally:
        signal.signal(signal.SIGINT, before)


def _signals() -> None:
    with pytest.raises(KeyboardInterrupt):
        _press()
    raise _Stop


@pytest.mark.parametrize("how", [_raises, _signals])
def test_an_error_in_any_operator_leaves_everything_right(plan, how):
    """Whichever kernel fails, the generator is where eager's draws had left it."""
    model = plan.apply(make(_Dropouts))
    expected = [g.clone() for g in _gradients(make(_Dropouts))]
    _gradients(model)

    def interrupt(n: int) -> Callable[[], bool]:
        mode = _Breaking(n, how)
        mode.__enter__()

        def reached() -> bool:
            mode.__exit__(None, None, None)
            return mode.left < 0

        return reached

    assert _interrupted_at_each(model, interrupt, expected) > 40


def test_the_first_calls_of_a_module_from_several_threads():
    """Each thread gets the output and the gradients of its own call; the step is prepared once."""
    kind = lambda: nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))  # noqa: E731
    plan = optimize(make(kind), sample(), budget_gb=1, loss_fn=square)
    model, eager = plan.apply(make(kind)), make(kind)
    together = threading.Barrier(4)

    def step(i: int) -> list[torch.Tensor]:
        together.wait()
        return list(torch.autograd.grad(square(model(sample(i))), list(model.parameters())))

    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)  # two forwards before a backward, rightly
        found = list(pool.map(step, range(4)))
    for i, gradients in enumerate(found):
        expected = torch.autograd.grad(square(eager(sample(i))), list(eager.parameters()))
        assert all(map(torch.equal, gradients, expected)), i
    assert len(model.forward._main.prepared) == 1
