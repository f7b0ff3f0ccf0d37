"""Determine whether a step fits in a limit, at what cost, and up to which size.

A schedule is valid for every step of the same wiring: the same operators read and make
the same storages, whatever their sizes. So a schedule found at one batch size is tried
at others, and its memory is extrapolated. During a given run the same storages are
alive, so the memory at each moment is affine in the batch size (except for rounding and
kernels' scratch), and the peak is the largest of these lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graph_capture.cost_graph import CostGraph
from solvers.least_memory import LeastMemory, least_memory
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.uniform import uniform_under_budget

Wiring = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is known about a step within a limit.

    Parameters
    ----------
    schedule
        A schedule that fits; ``None`` if none was found.
    least
        The least memory, if it had to be searched for.
    """

    schedule: Schedule | None
    least: LeastMemory | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickPlan:
    """A schedule within a limit, found by a short solve.

    Parameters
    ----------
    peak_bytes, cost_ns
        By replay.
    gap
        ``(time of the step - lower bound) / lower bound``.
    """

    schedule: Schedule
    peak_bytes: int
    cost_ns: int
    gap: float


def wiring_of(graph: CostGraph) -> Wiring:
    """What is computed from what, without sizes or costs."""
    operators = tuple(
        (op.target, op.inputs, op.outputs, op.pinned, op.ordered) for op in graph.operators
    )
    return operators, tuple((s.producer, s.kept) for s in graph.storages)


def find_fit(
    graph: CostGraph,
    limit_bytes: int,
    *,
    known: Sequence[Schedule] = (),
    thrifty: bool = False,
    time_limit_s: float,
    seed: int = 0,
) -> Fit:
    """Find a schedule within ``limit_bytes``: easy ones, then ``known`` ones, then by search.

    Parameters
    ----------
    known
        Schedules of steps of the same wiring.
    thrifty
        Skip the easy ones, which fit only because the limit is high.
    time_limit_s
        Seconds for the search.
    """
    candidates = [*known]
    if not thrifty:
        candidates.append(Schedule.keep_all(graph))
        segmented = uniform_under_budget(graph, limit_bytes)
        candidates += [] if segmented is None else [segmented]
    fitting = {
        schedule: outcome.cost_ns
        for schedule in candidates
        if (outcome := replay(graph, schedule)).peak_bytes <= limit_bytes
    }
    if fitting:
        return Fit(schedule=min(fitting, key=lambda schedule: fitting[schedule]))
    lowest = min(known, key=lambda schedule: replay(graph, schedule).peak_bytes, default=None)
    least = least_memory(graph, time_limit_s=time_limit_s, seed=seed, start=lowest)
    fits = least.peak_bytes <= limit_bytes
    return Fit(schedule=least.schedule if fits else None, least=least)


def quick_plan(
    graph: CostGraph, limit_bytes: int, start: Schedule, *, time_limit_s: float, seed: int = 0
) -> QuickPlan:
    """Return the best schedule within ``limit_bytes`` that a short solve finds from ``start``."""
    result = solve(graph, limit_bytes, time_limit_s=time_limit_s, seed=seed, hint=start)
    assert result.schedule is not None
    assert result.cost_ns is not None
    assert result.peak_bytes is not None
    return QuickPlan(
        schedule=result.schedule,
        peak_bytes=result.peak_bytes,
        cost_ns=result.cost_ns,
        gap=result.gap or 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLines:
    """Memory of one schedule at every moment, as lines over the batch size.

    Parameters
    ----------
    at_batch
        A batch size.
    memory_bytes
        Memory at this size, moment by moment.
    slope_bytes
        Bytes that one more row of the batch adds.
    """

    at_batch: int
    memory_bytes: np.ndarray
    slope_bytes: np.ndarray

    @classmethod
    def through(
        cls, schedule: Schedule, first: tuple[int, CostGraph], second: tuple[int, CostGraph]
    ) -> MemoryLines:
        """From two batch sizes with the same wiring."""
        (a, graph_a), (b, graph_b) = first, second
        memory_a = np.array(replay(graph_a, schedule).memory_bytes, dtype=np.float64)
        memory_b = np.array(replay(graph_b, schedule).memory_bytes, dtype=np.float64)
        return cls(at_batch=b, memory_bytes=memory_b, slope_bytes=(memory_b - memory_a) / (b - a))

    @classmethod
    def in_proportion(cls, schedule: Schedule, at: tuple[int, CostGraph]) -> MemoryLines:
        """From one batch size, as if all memory that is not resident grew with it."""
        batch, graph = at
        memory = np.array(replay(graph, schedule).memory_bytes, dtype=np.float64)
        slope = np.maximum(memory - graph.resident_bytes, 0) / batch
        return cls(at_batch=batch, memory_bytes=memory, slope_bytes=slope)

    def largest_within(self, limit_bytes: int) -> float:
        """The largest batch size at which no line is above the limit; infinite if none rises."""
        room = limit_bytes - self.memory_bytes
        rising = self.slope_bytes > 0
        if (room[~rising] < 0).any():
            return 0.0
        if not rising.any():
            return float("inf")
        return self.at_batch + float((room[rising] / self.slope_bytes[rising]).min())
