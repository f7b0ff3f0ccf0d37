"""Simulate a pipeline of stages, and divide layers among them.

A pipeline's devices have a budget each, and its first stage keeps the most micro-batches in
memory, so under one budget for all it recomputes the most and is the slowest: the others
wait for it. Giving it fewer layers is worth more than any better schedule inside it (Sun et
al., AdaPipe, ASPLOS 2024, section 4). Here each stage's times come from a plan for its
layers and its calls in flight, and the division with the least slowest stage is exact.

Simulated are GPipe (Huang et al., NeurIPS 2019) and 1F1B (Narayanan et al., PipeDream,
SOSP 2019), in the orders of ``torch.distributed.pipelining``. Sending takes the same time
between any two stages and runs beside computation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

PipelineSchedule = Literal["gpipe", "1f1b"]
SCHEDULES = get_args(PipelineSchedule)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Nanoseconds that a stage takes for one micro-batch."""

    forward_ns: int
    backward_ns: int

    @property
    def both_ns(self) -> int:
        """Forward and backward."""
        return self.forward_ns + self.backward_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One call of a stage: ``micro`` is the number of the micro-batch."""

    is_forward: bool
    micro: int
    begin_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRun:
    """A simulated step.

    Parameters
    ----------
    step_ns
        From the first stage's first call to the last end of any.
    spans
        Each stage's calls, in order.
    """

    step_ns: int
    spans: tuple[tuple[Span, ...], ...]

    def idle_share(self, stage: int) -> float:
        """The part of the step in which a stage waits."""
        busy_ns = sum(span.end_ns - span.begin_ns for span in self.spans[stage])
        return 1 - busy_ns / self.step_ns if self.step_ns else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Layers by stage.

    Parameters
    ----------
    ends
        For each stage the number of layers in it and in those before it.
    run
        The simulated step.
    lower_bound_ns
        No division of these layers takes less.
    """

    ends: tuple[int, ...]
    run: PipelineRun
    lower_bound_ns: int

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First layer of each stage, and the first one behind it."""
        return tuple(zip((0, *self.ends[:-1]), self.ends, strict=True))


TimesOf = Callable[[int, int, int], StageTimes | None]
"""A stage's times with the layers from one up to another; ``None`` where they do not fit."""


def calls_in_flight(
    schedule: PipelineSchedule, stage: int, num_stages: int, num_microbatches: int
) -> int:
    """Micro-batches of which a stage has run the forward and not the backward pass, at most."""
    if schedule == "gpipe":
        return num_microbatches
    return min(num_microbatches, num_stages - stage)


def calls_of(
    schedule: PipelineSchedule, stage: int, num_stages: int, num_microbatches: int
) -> list[tuple[bool, int]]:
    """A stage's calls in order: whether it is forward, and the micro-batch."""
    ahead = calls_in_flight(schedule, stage, num_stages, num_microbatches)
    calls = [(True, micro) for micro in range(ahead)]
    for micro in range(num_microbatches):
        calls.append((False, micro))
        if ahead + micro < num_microbatches:
            calls.append((True, ahead + micro))
    return calls


def simulate(
    stages: Sequence[StageTimes],
    num_microbatches: int,
    schedule: PipelineSchedule = "1f1b",
    *,
    send_ns: int = 0,
) -> PipelineRun:
    """Run a step on paper: each call begins when its stage is free and its input has arrived.

    Parameters
    ----------
    send_ns
        From the end of a call until its output has arrived at the next stage.

    Raises
    ------
    ValueError
        For another schedule, no stage, or no micro-batch.
    """
    _check(schedule, len(stages), num_microbatches)
    last = len(stages) - 1
    todo = [calls_of(schedule, s, len(stages), num_microbatches) for s in range(len(stages))]
    spans: list[list[Span]] = [[] for _ in stages]
    ended: dict[tuple[int, bool, int], int] = {}

    def arrives(stage: int, is_forward: bool, micro: int) -> int | None:
        if is_forward:
            before = None if stage == 0 else (stage - 1, True, micro)
        else:
            before = (stage, True, micro) if stage == last else (stage + 1, False, micro)
        if before is None:
            return 0
        if before not in ended:
            return None
        return ended[before] + (send_ns if before[0] != stage else 0)

    while any(todo):
        for stage, times in enumerate(stages):
            while todo[stage]:
                is_forward, micro = todo[stage][0]
                ready_ns = arrives(stage, is_forward, micro)
                if ready_ns is None:
                    break
                begin_ns = max(ready_ns, spans[stage][-1].end_ns if spans[stage] else 0)
                end_ns = begin_ns + (times.forward_ns if is_forward else times.backward_ns)
                ended[stage, is_forward, micro] = end_ns
                spans[stage].append(
                    Span(is_forward=is_forward, micro=micro, begin_ns=begin_ns, end_ns=end_ns)
                )
                todo[stage].pop(0)
    return PipelineRun(step_ns=max(own[-1].end_ns for own in spans), spans=tuple(map(tuple, spans)))


def divide_layers(
    times_of: TimesOf,
    num_layers: int,
    num_stages: int,
    num_microbatches: int,
    schedule: PipelineSchedule = "1f1b",
    *,
    send_ns: int = 0,
) -> Division | None:
    """Divide a row of layers among stages, so that a step takes little time.

    The slowest stage is as fast as any division's, by a dynamic program over the stages'
    ends, if a stage with one more layer takes no less time and memory. From there single
    layers move to a neighbour as long as the simulated step gets shorter, which is not
    exact; the lower bound says how much may be left.

    Parameters
    ----------
    times_of
        Asked once for each stage and range of layers that may matter.

    Returns
    -------
    Division or None
        ``None`` where no division fits.

    Raises
    ------
    ValueError
        When there are fewer layers than stages, or an argument is invalid.
    """
    _check(schedule, num_stages, num_microbatches)
    if num_layers < num_stages:
        raise ValueError(f"{num_stages} stages need a layer each, there are {num_layers}")
    known = cache(times_of)
    ends = _least_slowest(known, num_layers, num_stages)
    if ends is None:
        return None

    def run(ends: tuple[int, ...]) -> PipelineRun | None:
        stages = [known(s, *layers) for s, layers in enumerate(_ranges(ends))]
        if not all(stages):
            return None
        return simulate([s for s in stages if s], num_microbatches, schedule, send_ns=send_ns)

    best = run(ends)
    assert best is not None
    slowest_ns = max(_both_ns(known(s, *layers)) for s, layers in enumerate(_ranges(ends)))
    improved = True
    while improved:
        improved = False
        for neighbour in _neighbours(ends):
            found = run(neighbour)
            if found is not None and found.step_ns < best.step_ns:
                ends, best, improved = neighbour, found, True
    return Division(ends=ends, run=best, lower_bound_ns=num_microbatches * slowest_ns)


def _check(schedule: PipelineSchedule, num_stages: int, num_microbatches: int) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is one of {SCHEDULES}, got {schedule!r}")
    for name, number in (("stage", num_stages), ("micro-batch", num_microbatches)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"a pipeline needs one {name} at least, got {number!r}")


def _least_slowest(times_of: TimesOf, num_layers: int, num_stages: int) -> tuple[int, ...] | None:
    """The ends of the stages for which the slowest one is fastest."""
    even = [times_of(s, *layers) for s, layers in enumerate(even_ranges(num_layers, num_stages))]
    limit_ns = max(times.both_ns if times else sys.maxsize for times in even)
    reached: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(num_stages):
        after: dict[int, tuple[int, tuple[int, ...]]] = {}
        behind = num_stages - 1 - stage
        for first, (slowest_ns, ends) in reached.items():
            nearest = num_layers if behind == 0 else first + 1
            for end in range(nearest, num_layers - behind + 1):
                times = times_of(stage, first, end)
                if times is None or times.both_ns > limit_ns:
                    break
                worst_ns = max(slowest_ns, times.both_ns)
                if end not in after or (worst_ns, ends) < after[end]:
                    after[end] = worst_ns, (*ends, end)
        reached = after
    return reached[num_layers][1] if num_layers in reached else None


def even_ranges(num_layers: int, num_stages: int) -> list[tuple[int, int]]:
    """The layers of stages that have the same number, or differ by one."""
    return _ranges(tuple(num_layers * (s + 1) // num_stages for s in range(num_stages)))


def _both_ns(times: StageTimes | None) -> int:
    assert times is not None
    return times.both_ns


def _ranges(ends: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((0, *ends[:-1]), ends, strict=True))


def _neighbours(ends: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Divisions in which one stage has given one layer to the next or the one before."""
    found = []
    for s in range(len(ends) - 1):
        for end in (ends[s] - 1, ends[s] + 1):
            low = ends[s - 1] if s else 0
            if low < end < ends[s + 1]:
                found.append((*ends[:s], end, *ends[s + 1 :]))
    return found
