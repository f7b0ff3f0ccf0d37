"""Times measured on the device."""

from __future__ import annotations

import itertools
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.costs import profile
from graph_capture.costs.cost_model import Call
from graph_capture.costs.devices import device_for
from graph_capture.costs.profile import Profile, ProfiledCosts
from graph_capture.costs.resolve import resolve_cost_model
from graph_capture.costs.roofline import Roofline
from graph_capture.costs.target import Target, target_of
from graph_capture.step_capture import capture
from planner import optimize
from tests.capturing import capture_step

aten = torch.ops.aten
X = torch.ones(8, 16)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 4)).train()


def _target() -> Target:
    return target_of(_model(), [X])


def _costs(directory: Path) -> ProfiledCosts:
    return ProfiledCosts(_target(), Profile(cache_dir=directory))


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _call(func: Any, *args: Any, out: Any = None) -> Call:
    return Call(func=func, args=args, kwargs={}, out=out)


SMALL = _call(aten.mm.default, _meta(4, 4), _meta(4, 4), out=_meta(4, 4))
LARGE = _call(aten.mm.default, _meta(400, 400), _meta(400, 400), out=_meta(400, 400))


def test_a_call_is_timed_once(tmp_path: Path) -> None:
    """The same call asked for again has the same time and is not run again."""
    costs = _costs(tmp_path)
    first = costs.time_ns(LARGE)
    assert first > costs.time_ns(SMALL) > 0
    assert costs.time_ns(LARGE) == first
    assert costs.num_timed == 2


def test_the_second_profile_times_nothing(tmp_path: Path) -> None:
    """A model that is captured a second time is priced from the disk: the same graph, no runs."""
    graphs, told = [], []
    for _ in range(2):
        model = _model()
        step = capture_step(
            model,
            {"input": X},
            cost_model=Profile(cache_dir=tmp_path),
            progress=lambda place, num_calls: told.append((place, num_calls)),
        )
        graphs.append((step.graph, step.unplanned, step.costs))
        told.append((0, 0))
    assert graphs[0] == graphs[1]
    assert told.index((0, 0)) > 5
    assert told[-2:] == [(0, 0), (0, 0)]


def test_scratch_is_remembered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second capture runs no call to see its scratch."""
    model = nn.Conv2d(3, 4, 3).train()
    x = torch.ones(2, 3, 16, 16)
    graphs = []
    for _ in range(2):
        graphs.append(capture(model, x, cost_model=Profile(cache_dir=tmp_path)))
        monkeypatch.setattr("graph_capture.costs.workspace._measure", lambda *_: 1 / 0)
    assert graphs[0] == graphs[1]
    assert graphs[0].operators[0].workspace_bytes > 0


def test_progress_counts_the_distinct_calls(tmp_path: Path) -> None:
    """Calls are told one after the other, out of as many as there are."""
    told: list[tuple[int, int]] = []
    _costs(tmp_path).prepare(
        [SMALL, LARGE, SMALL], lambda place, num_calls: told.append((place, num_calls))
    )
    assert told == [(1, 2), (2, 2)]


def test_an_interrupt_keeps_what_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C in the second batch the first is on disk."""
    monkeypatch.setattr(profile, "_BATCH_BYTES", 1)  # each call is a batch of its own

    def interrupt(place: int, _num_calls: int) -> None:
        if place == 2:
            raise KeyboardInterrupt

    costs = _costs(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        costs.prepare([SMALL, LARGE], interrupt)
    costs.save()
    again = _costs(tmp_path)
    again.prepare([SMALL, LARGE])
    assert again.num_timed == 1


def test_an_interrupted_capture_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a step is captured leaves what was timed in the file."""
    monkeypatch.setattr(profile, "_BATCH_BYTES", 1)

    def interrupt(place: int, _num_calls: int) -> None:
        if place == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_step(
            _model(), {"input": X}, cost_model=Profile(cache_dir=tmp_path), progress=interrupt
        )
    told: list[int] = []
    capture_step(
        _model(),
        {"input": X},
        cost_model=Profile(cache_dir=tmp_path),
        progress=lambda _place, num_calls: told.append(num_calls),
    )
    fresh: list[int] = []
    capture_step(
        _model(),
        {"input": X},
        cost_model=Profile(cache_dir=tmp_path / "other"),
        progress=lambda _place, num_calls: fresh.append(num_calls),
    )
    assert told[0] == fresh[0] - 3


def test_what_does_not_fit_is_left_to_the_roofline(tmp_path: Path) -> None:
    """A call of four terabytes is not run, and the record says why it is not timed."""
    huge = _meta(10**12)
    call = _call(aten.relu.default, huge, out=huge)
    costs = _costs(tmp_path)
    costs.prepare([call, SMALL])
    assert costs.time_ns(call) == Roofline(device_for("cpu")).time_ns(call)
    assert costs.record().notes[-1] == (
        "1 of 2 distinct calls not timed, priced by the roofline: "
        "1 too large for the device (aten.relu)"
    )


def test_what_is_unsafe_is_left_to_the_roofline(tmp_path: Path) -> None:
    """A kernel that follows its arguments through memory is not run on made-up ones."""
    x, lengths = _meta(10, 2, 5), _meta(2, dtype=torch.long)
    call = _call(
        aten._ctc_loss.Tensor, x, _meta(2, 3, dtype=torch.long), lengths, lengths, out=(_meta(2), x)
    )
    costs = _costs(tmp_path)
    assert costs.time_ns(call) == Roofline(device_for("cpu")).time_ns(call)
    assert "1 unsafe to run alone (aten._ctc_loss.Tensor)" in costs.record().notes[-1]


def test_what_refuses_its_arguments_is_left_to_the_roofline(tmp_path: Path) -> None:
    """A kernel that raises on made-up arguments ends neither the profile nor the capture."""
    x = _meta(2, 3)
    call = _call(aten.linalg_inv_ex.default, x, out=(x, _meta(2)))
    costs = _costs(tmp_path)
    assert costs.time_ns(call) == Roofline(device_for("cpu")).time_ns(call)
    assert "1 refused made-up arguments (aten.linalg_inv_ex)" in costs.record().notes[-1]


def test_a_host_without_memory_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MemoryError while arguments are made leaves the call to the roofline, as too large."""

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("graph_capture.costs.profile.Maker.trial", out_of_memory)
    costs = _costs(tmp_path)
    costs.prepare([SMALL])
    assert "1 too large for the device" in costs.record().notes[-1]


def test_the_record_says_where_times_come_from(tmp_path: Path) -> None:
    """Model, device, threads and torch are in the record."""
    costs = _costs(tmp_path)
    costs.prepare([SMALL])
    record = costs.record()
    assert record.model == "profile"
    assert record.device.endswith(", 1 thread")
    assert record.notes == (f"torch {torch.__version__}", "1 distinct call")


def test_a_device_that_is_not_at_hand() -> None:
    """Calls cannot be timed where the model does not lie: the error names the way out."""
    target = target_of(nn.Linear(2, 2), [], "h100")
    for asked in ("profile", Profile()):
        with pytest.raises(ValueError, match="use cost_model='roofline'"):
            resolve_cost_model(asked, target)


def test_threads_are_part_of_the_key(tmp_path: Path) -> None:
    """A time measured on one thread is no time on two."""
    costs = _costs(tmp_path)
    costs.prepare([SMALL])
    costs.save()
    torch.set_num_threads(2)
    try:
        other = _costs(tmp_path)
        other.prepare([SMALL])
    finally:
        torch.set_num_threads(1)
    assert other.num_timed == 1


def test_profiling_leaves_no_traces(tmp_path: Path) -> None:
    """Parameters, gradients and the random generator are what they were."""
    model = _model()
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    capture(model, X, cost_model=Profile(cache_dir=tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())


def test_a_plan_on_profiled_times(tmp_path: Path) -> None:
    """``optimize`` shows the timing in its progress and writes into the plan what was timed."""
    messages: list[str] = []
    plan = optimize(
        _model(),
        X,
        budget_gb=1,
        loss_fn=torch.sum,
        optimizer="adamw",
        cost_model=Profile(cache_dir=tmp_path),
        progress=lambda event: messages.append(event.message),
    )
    timing = [m for m in messages if m.startswith("timing 1 of ")]
    assert timing
    assert messages.index(timing[0]) == 0
    assert plan.costs.model == "profile"
    assert plan.baseline_step_us > 0
    # An optimizer's step only names itself to the profiler: nothing that a user should read of.
    assert len(plan.costs.notes) == 2


def test_runs_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No call runs twice in a row, where it would find its own arguments in cache."""
    order: list[int] = []
    timed = profile.time_in_turn

    def watch(trials: Any, device: Any, samples: Any) -> Any:
        class Watched(dict):
            def __getitem__(self, key: str) -> Any:
                order.append(list(trials).index(key))
                return trials[key]

        return timed(Watched(trials), device, samples)

    monkeypatch.setattr(profile, "time_in_turn", watch)
    _costs(tmp_path).prepare([SMALL, LARGE])
    assert len(order) >= 6
    assert all(itertools.starmap(operator.ne, itertools.pairwise(order[:6])))


@pytest.mark.gpu
def test_a_card_is_timed_by_its_own_clock(tmp_path: Path) -> None:
    """A product of 4096 takes a card longer than one of 4, and longer than its peak rate allows."""
    device = torch.device("cuda", torch.cuda.current_device())
    target = target_of(nn.Linear(2, 2).to(device), [])
    costs = ProfiledCosts(target, Profile(cache_dir=tmp_path))
    large = _meta(4096, 4096)
    large_ns = costs.time_ns(_call(aten.mm.default, large, large, out=large))
    assert large_ns > costs.time_ns(SMALL) > 0
    assert large_ns > 2 * 4096**3 / 2.5e15 * 1e9  # TF32 on any card of today
