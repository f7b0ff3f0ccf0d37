"""Questions of the experiments: what a strategy achieves, and the least cost of a budget.

A question about time *and* memory ("is there a schedule within so many bytes that takes
no longer than that?") stops the solver as soon as its schedule or its bound answers it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graph_capture.calls.autocast import autocast_as
from graph_capture.calls.call_spec import bind_call, split_sample, tensors_of
from graph_capture.cost_graph import CostGraph
from graph_capture.costs.devices import Device
from graph_capture.costs.target import target_of
from graph_capture.loop.optimizer_step import measure_optimizer
from graph_capture.step_capture import capture_step
from solvers.least_memory import least_memory
from solvers.portfolio import solve
from solvers.progress import ProgressEvent
from solvers.replay import replay
from solvers.result import SolveResult, SolveStatus
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy

NOTHING_FITS = "proven: nothing fits"
NOTHING_FOUND = "no schedule found"
"""Also the error of strategies that solve; any other error means that one does not apply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The figures of a schedule.

    Parameters
    ----------
    strategy, setting
        The strategy that proposed it, and its parameters.
    peak_bytes
        By replay, resident storages included.
    overhead
        Extra time over the step that recomputes nothing, a fraction.
    fits
        Whether the peak is within the budget; true without one.
    bound
        The lower bound on the time of every schedule whose first runs keep the base
        order, as an overhead; ``None`` if there is none.
    error
        Why there are no figures; ``""`` if there are.
    schedule
        The schedule of the figures.
    """

    strategy: str
    setting: str = ""
    peak_bytes: int | None = None
    overhead: float | None = None
    fits: bool = False
    bound: float | None = None
    error: str = ""
    schedule: Schedule | None = field(default=None, repr=False)

    @property
    def gap(self) -> float | None:
        """``(time - bound) / bound`` of the whole step; ``None`` without a bound."""
        if self.overhead is None or self.bound is None:
            return None
        return (self.overhead - self.bound) / (1 + self.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Whether a step can be run within a budget and a time.

    Parameters
    ----------
    schedule
        A schedule within both; ``None`` if none was found.
    excluded
        Whether a bound proves that there is none.
    """

    schedule: Schedule | None
    excluded: bool = False


def captured_graph(
    model: nn.Module,
    sample: Any,
    *,
    device: str | Device | None = None,
    autocast: torch.dtype | None = None,
    optimizer: str | None = None,
    measure_scratch: bool = False,
) -> CostGraph:
    """The step of a model as ``optimize`` would see it.

    Without ``measure_scratch``, no kernel runs, so any size is possible, and kernels'
    scratch memory is left out.
    """
    arguments = bind_call(model.forward, *split_sample(sample))
    target = target_of(model, tensors_of(arguments), device)
    with autocast_as(target.torch_type, autocast):
        return capture_step(
            model,
            arguments,
            optimizer=measure_optimizer(optimizer, model, target),
            forward=model.forward,
            target=target,
            measure_scratch=measure_scratch,
        ).graph


def strategy_figure(
    graph: CostGraph,
    name: str,
    *,
    budget_bytes: int | None = None,
    time_limit_s: float = 20.0,
    seed: int = 0,
) -> Figure:
    """What a strategy of the registry achieves, or why it does not apply."""
    try:
        outcome = apply_strategy(
            STRATEGIES[name],
            graph,
            budget_bytes=budget_bytes,
            time_limit_s=time_limit_s,
            seed=seed,
        )
    except StrategyError as error:
        return Figure(strategy=name, error=str(error))
    return Figure(
        strategy=name,
        setting=outcome.setting,
        peak_bytes=outcome.peak_bytes,
        overhead=outcome.cost_ns / graph.base_cost_ns - 1,
        fits=outcome.fits,
        schedule=outcome.schedule,
    )


def optimum_figure(
    graph: CostGraph,
    budget_bytes: int,
    *,
    time_limit_s: float,
    seed: int = 0,
    hint: Schedule | None = None,
) -> Figure:
    """The solver's overhead at a budget, and its lower bound."""
    result = solve(graph, budget_bytes, time_limit_s=time_limit_s, seed=seed, hint=hint)
    return _figure(graph, result)


def answer(
    graph: CostGraph,
    budget_bytes: int,
    cost_limit_ns: int,
    *,
    time_limit_s: float,
    seed: int = 0,
    hint: Schedule | None = None,
) -> Answer:
    """Whether a schedule within the budget takes no longer than ``cost_limit_ns``.

    The ``hint`` is a schedule of any step of the same wiring; it is tried first.
    """
    for schedule in (Schedule.keep_all(graph), *([hint] if hint else [])):
        outcome = replay(graph, schedule)
        if outcome.peak_bytes <= budget_bytes and outcome.cost_ns <= cost_limit_ns:
            return Answer(schedule=schedule)
    stop = threading.Event()

    def watch(event: ProgressEvent) -> None:
        found = event.incumbent_ns is not None and event.incumbent_ns <= cost_limit_ns
        # A bound of staged schedules only is no answer: others may be quicker.
        bound_ns = event.global_bound_ns
        if found or (bound_ns is not None and bound_ns > cost_limit_ns):
            stop.set()

    result = solve(
        graph,
        budget_bytes,
        time_limit_s=time_limit_s,
        seed=seed,
        hint=hint,
        progress=watch,
        stop=stop,
    )
    if result.cost_ns is not None and result.cost_ns <= cost_limit_ns:
        return Answer(schedule=result.schedule)
    excluded = result.status is SolveStatus.INFEASIBLE or result.global_bound_ns > cost_limit_ns
    return Answer(schedule=None, excluded=excluded)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastPeak:
    """The least peak known within a time.

    Parameters
    ----------
    peak_bytes
        Peak of a schedule that was found.
    excluded_bytes
        The largest budget known to be proven too small.
    """

    peak_bytes: int
    excluded_bytes: int


def least_peak_within(
    graph: CostGraph,
    cost_limit_ns: int,
    *,
    time_limit_s: float,
    seed: int = 0,
    tolerance: float = 0.01,
    known: Sequence[Schedule] = (),
) -> LeastPeak:
    """The least peak of a schedule that takes no longer than ``cost_limit_ns``, by halving.

    Parameters
    ----------
    time_limit_s
        Time limit for each budget tried.
    tolerance
        Where halving ends, as a share of the peak that recomputes nothing.
    known
        Schedules to begin with; those that take longer are skipped.
    """
    schedule = Schedule.keep_all(graph)
    peak = highest = replay(graph, schedule).peak_bytes
    for other in known:
        outcome = replay(graph, other)
        if outcome.cost_ns <= cost_limit_ns and outcome.peak_bytes < peak:
            schedule, peak = other, outcome.peak_bytes
    least = least_memory(graph, time_limit_s=time_limit_s, seed=seed)
    low, excluded = least.peak_bytes, least.lower_bound_bytes - 1
    # If even the schedule of the lowest peak is fast enough, lower budgets need no trial.
    if replay(graph, least.schedule).cost_ns <= cost_limit_ns:
        return LeastPeak(peak_bytes=low, excluded_bytes=excluded)
    while peak - low > tolerance * highest:
        budget = (low + peak) // 2
        found = answer(
            graph, budget, cost_limit_ns, time_limit_s=time_limit_s, seed=seed, hint=schedule
        )
        if found.schedule is None:
            low = budget
            excluded = max(excluded, budget if found.excluded else 0)
        else:
            schedule = found.schedule
            peak = replay(graph, schedule).peak_bytes
    return LeastPeak(peak_bytes=peak, excluded_bytes=excluded)


def forward_ns(graph: CostGraph) -> int:
    """Time of the forward pass with the loss."""
    return sum(op.cost_ns for op in graph.operators if op.phase in ("forward", "loss"))


def _figure(graph: CostGraph, result: SolveResult) -> Figure:
    if result.cost_ns is None:
        proven = result.status is SolveStatus.INFEASIBLE
        return Figure(strategy="auto", error=NOTHING_FITS if proven else NOTHING_FOUND)
    return Figure(
        strategy="auto",
        peak_bytes=result.peak_bytes,
        overhead=result.cost_ns / graph.base_cost_ns - 1,
        fits=True,
        bound=max(0.0, result.global_bound_ns / graph.base_cost_ns - 1),
        schedule=result.schedule,
    )
