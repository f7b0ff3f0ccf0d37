"""Calls that take turns on the clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graph_capture.costs import timing
from graph_capture.costs.cost_model import Call
from graph_capture.costs.timing import MAX_RUNS, MIN_RUNS, median_ns, time_in_turn
from graph_capture.costs.trial import Maker, Trial

aten = torch.ops.aten
CPU = torch.device("cpu")


class _Clock:
    """A clock that each call moves on by what it takes."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    """Stands in for the real one."""
    clock = _Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def _trial(clock: _Clock, order: list[int], taken_ns: int) -> Trial:
    def func() -> None:
        order.append(taken_ns)
        clock.now_ns += taken_ns

    return Trial(func=func, args=(), kwargs={}, grad_enabled=False, fresh=())


def test_calls_take_turns(clock: _Clock) -> None:
    """All run once, then all a second time: none finds what it left in cache itself."""
    order: list[int] = []
    trials = {str(n): _trial(clock, order, n) for n in (1, 2, 3)}
    samples: dict[str, list[int]] = {}
    assert time_in_turn(trials, CPU, samples) == {}
    assert order == [1, 2, 3] * MAX_RUNS
    assert samples == {str(n): [n] * MAX_RUNS for n in (1, 2, 3)}


def test_dear_calls_run_less_often(clock: _Clock) -> None:
    """A call of a second runs three times, one of a microsecond as often as any."""
    order: list[int] = []
    trials = {"dear": _trial(clock, order, 10**9), "cheap": _trial(clock, order, 10**3)}
    samples: dict[str, list[int]] = {}
    time_in_turn(trials, CPU, samples)
    assert len(samples["dear"]) == MIN_RUNS
    assert len(samples["cheap"]) == MAX_RUNS


def test_a_call_that_fails_stops_no_other(clock: _Clock) -> None:
    """The one that raises is reported and has no more turns."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("not again")

    bad = Trial(func=refuse, args=(), kwargs={}, grad_enabled=False, fresh=())
    samples: dict[str, list[int]] = {}
    failed = time_in_turn({"bad": bad, "good": _trial(clock, [], 5)}, CPU, samples)
    assert list(failed) == ["bad"]
    assert samples == {"good": [5] * MAX_RUNS}


def test_an_interrupt_leaves_the_samples(clock: _Clock) -> None:
    """What ran before Ctrl-C is there."""
    order: list[int] = []

    def interrupt() -> None:
        if len(order) == 3:
            raise KeyboardInterrupt

    trials = {
        "good": _trial(clock, order, 5),
        "last": Trial(func=interrupt, args=(), kwargs={}, grad_enabled=False, fresh=()),
    }
    samples: dict[str, list[int]] = {}
    with pytest.raises(KeyboardInterrupt):
        time_in_turn(trials, CPU, samples)
    assert samples["good"] == [5, 5, 5]


def test_the_median_forgets_a_slow_moment() -> None:
    """One run in three that was disturbed changes nothing; two runs are too few."""
    assert median_ns([100, 9_000, 102]) == 102
    assert median_ns([100, 102]) is None


def test_writing_calls_begin_with_the_same_values() -> None:
    """A tensor that is halved in each run does not vanish into denormal numbers."""
    x = torch.empty(64, device="meta")
    trial = Maker(CPU).trial(Call(func=aten.mul_.Tensor, args=(x, 1e-20), kwargs={}, out=x))
    first = trial.args[0].clone()
    time_in_turn({"half": trial}, CPU, {})
    assert torch.equal(trial.args[0], first * 1e-20)
