"""Simulated pipelines and the division of layers, by hand and against enumeration."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solvers.pipeline import (
    PipelineSchedule,
    StageTimes,
    calls_in_flight,
    divide_layers,
    simulate,
)


def _stage(forward_ns: int, backward_ns: int) -> StageTimes:
    return StageTimes(forward_ns=forward_ns, backward_ns=backward_ns)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_stages_take_the_known_time(schedule: PipelineSchedule) -> None:
    """(micro-batches + stages - 1) times forward and backward, as both papers have it."""
    run = simulate([_stage(1, 2)] * 4, 8, schedule)
    assert run.step_ns == (8 + 4 - 1) * 3
    assert run.idle_share(2) == pytest.approx(3 / 11)


def test_two_stages_by_hand() -> None:
    """Two micro-batches, a slow second stage, and time to send."""
    run = simulate([_stage(1, 2), _stage(3, 4)], 2, "1f1b", send_ns=1)
    ends = [[(s.is_forward, s.micro, s.end_ns) for s in own] for own in run.spans]
    assert ends == [
        [(True, 0, 1), (True, 1, 2), (False, 0, 12), (False, 1, 19)],
        [(True, 0, 5), (False, 0, 9), (True, 1, 12), (False, 1, 16)],
    ]
    assert run.step_ns == 19


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 6),
    st.sampled_from(["gpipe", "1f1b"]),
)
def test_calls_in_flight_are_those_of_the_run(
    times: list[tuple[int, int]], num_microbatches: int, schedule: PipelineSchedule
) -> None:
    """Counted along each stage's calls, the most is what plans are told."""
    run = simulate([_stage(*t) for t in times], num_microbatches, schedule)
    for stage, spans in enumerate(run.spans):
        depth = most = 0
        for span in spans:
            depth += 1 if span.is_forward else -1
            most = max(most, depth)
        assert depth == 0
        assert most == calls_in_flight(schedule, stage, len(times), num_microbatches)


@given(
    st.lists(st.integers(1, 20), min_size=3, max_size=8),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(20, 90),
)
def test_no_division_has_a_faster_slowest_stage(
    layers: list[int], num_stages: int, num_microbatches: int, fits: int
) -> None:
    """Against all divisions, where earlier stages fit less; the bound holds for all."""

    def times_of(stage: int, first: int, end: int) -> StageTimes | None:
        own = sum(layers[first:end]) * (num_stages - stage)
        return None if own > fits else _stage(own, own + 1)

    runs = []
    for inner in combinations(range(1, len(layers)), num_stages - 1):
        ends = (*inner, len(layers))
        stages = [times_of(s, a, b) for s, (a, b) in enumerate(zip((0, *inner), ends, strict=True))]
        if all(stages):
            known = [stage for stage in stages if stage]
            slowest_ns = max(stage.both_ns for stage in known)
            runs.append((slowest_ns, simulate(known, num_microbatches).step_ns))
    found = divide_layers(times_of, len(layers), num_stages, num_microbatches)
    if found is None:
        assert not runs
        return
    assert found.lower_bound_ns == num_microbatches * min(slowest for slowest, _ in runs)
    assert found.lower_bound_ns <= min(step for _, step in runs) <= found.run.step_ns


def test_a_heavy_first_stage_gets_fewer_layers() -> None:
    """Six equal layers that cost double in the first of two stages: two and four."""
    found = divide_layers(
        lambda stage, first, end: _stage((end - first) * (2 - stage), (end - first) * (2 - stage)),
        6,
        2,
        8,
    )
    assert found is not None
    assert found.ranges == ((0, 2), (2, 6))


def test_what_cannot_be_is_refused() -> None:
    """More stages than layers, another schedule, no micro-batch."""
    with pytest.raises(ValueError, match="3 stages need a layer each, there are 2"):
        divide_layers(lambda *_: _stage(1, 1), 2, 3, 1)
    with pytest.raises(ValueError, match="schedule is one of"):
        simulate([_stage(1, 1)], 1, "zero_bubble")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least"):
        simulate([_stage(1, 1)], 0)
