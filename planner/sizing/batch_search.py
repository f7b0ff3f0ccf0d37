"""Search for the largest batch: which sizes to capture, and which schedules to try there.

Memory at each moment of a step is nearly affine in the batch size (``fitting.py``), so
two captures predict the largest batch, both for the unplanned step and for a schedule.
The prediction is then checked: the step is captured at that size, where it must fit,
and at the next larger one, where it must not. Without a plan the result is exact. With
a plan, "must not" means that a search of :func:`solvers.least_memory.least_memory`
found nothing. Both assume that memory grows with the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from graph_capture.errors import CaptureError
from graph_capture.policies import apply_policies
from graph_capture.units import format_bytes
from solvers.least_memory import LeastMemory
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.budget import Budget
from ..base.live_state import LiveState
from ..base.request import Request
from ..errors import InfeasibleBudgetError
from ..plan_record import PlanRecord
from ..planning.captured_call import CapturedCall
from ..planning.known_least import LEAST_MEMORY_LIMIT_S
from ..planning.make_plan import (
    make_plan,
)
from .fitting import Fit, MemoryLines, Wiring, find_fit, wiring_of
from .step_family import StepFamily

SEARCH_SHARE = 0.6
"""Share of the time limit for the search; the rest is for the plan at the last batch."""

S_PER_OPERATOR, SHORTEST_S, LONGEST_S = 0.1, 10.0, 60.0
"""The time limit, unless one is given: seconds per operator, and the least and the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCapture:
    """The step at one batch size.

    Parameters
    ----------
    captured
        The captured step, with the unplanned step beside it.
    constrained
        The step under the user's own rules.
    arguments
        The call's arguments, with specifications for tensors.
    unplanned_bytes
        Peak without a plan.
    """

    captured: CapturedStep
    constrained: CapturedStep
    arguments: Any
    unplanned_bytes: int

    @property
    def unplanned(self) -> CostGraph:
        assert self.captured.unplanned is not None
        return self.captured.unplanned


class BatchSearch:
    """Captures and schedules of one search, by batch size."""

    def __init__(
        self,
        family: StepFamily,
        budget: Budget,
        request: Request,
        largest: int,
        say: Callable[[str], None],
    ) -> None:
        self._family = family
        self._budget = budget
        self._request = request
        self._largest = largest
        self._say = say
        self._time_limit_s = request.options.time_limit_s
        self._left_s = SEARCH_SHARE * self._time_limit_s
        self.captures: dict[int, BatchCapture] = {}
        self.least_of: dict[int, LeastMemory] = {}
        self._fits: dict[int, Fit] = {}
        self._schedules: dict[Wiring, list[Schedule]] = {}

    def allow(self, time_limit_s: float | None) -> None:
        """Set the time for searching and solving; ``None`` chooses it by the step's size."""
        if time_limit_s is None:
            graph = self.at(self._start).captured.graph
            by_size_s = S_PER_OPERATOR * graph.num_operators
            time_limit_s = min(LONGEST_S, max(SHORTEST_S, by_size_s))
        self._time_limit_s = time_limit_s
        self._left_s = SEARCH_SHARE * time_limit_s

    @property
    def _start(self) -> int:
        """The batch that is tried first."""
        return min(self._family.sample.batch or 1, self._largest)

    def at(self, batch: int) -> BatchCapture:
        """Return the step at this batch size, captured once."""
        if batch not in self.captures:
            self._say(f"batch {batch}: capturing")
            request = self._request
            arguments = self._family.arguments(batch, None)
            try:
                captured = self._family.capture(arguments, batch, None)
            except CaptureError as error:
                error.add_note(f"at batch {batch}")
                raise
            assert captured.unplanned is not None
            keep_all = Schedule.keep_all(captured.unplanned)
            self.captures[batch] = BatchCapture(
                captured=captured,
                constrained=apply_policies(
                    captured, request.never_recompute, request.always_recompute
                ),
                arguments=arguments,
                unplanned_bytes=replay(captured.unplanned, keep_all).peak_bytes,
            )
        return self.captures[batch]

    def without_plan(self) -> int:
        """Return the largest batch whose unplanned step fits; 0 if there is none."""
        return self._largest_of(self._fits_unplanned, self._guess_unplanned, 0, self._start)

    def with_plan(self, without: int) -> int:
        """Return the largest batch for which a schedule within the limit is found.

        Raises
        ------
        InfeasibleBudgetError
            When there is none for a batch of one.
        """
        if without == self._largest:
            return without
        batch = self._largest_of(self._fits_planned, self._guess_planned, without, without + 1)
        if batch == 0:
            raise self._not_even_one()
        return batch

    def plan(self, batch: int) -> tuple[PlanRecord, LiveState]:
        """Make a plan for this batch, from the schedule that was found for it."""
        step = self.at(batch)
        fit = self._fits.get(batch) or self._find(batch)
        left_s = max(self._time_limit_s * (1 - SEARCH_SHARE), self._left_s)
        options = replace(self._request.options, time_limit_s=left_s)
        call = CapturedCall(
            model=self._family.model, arguments=step.arguments, captured=step.captured
        )
        with self._family.under_autocast():
            return make_plan(call, replace(self._request, options=options), hint=fit.schedule)

    # -- one batch ---------------------------------------------------------------

    def _fits_unplanned(self, batch: int) -> bool:
        return self.at(batch).unplanned_bytes <= self._budget.usable_bytes

    def _fits_planned(self, batch: int) -> bool:
        return self._find(batch).schedule is not None

    def _find(self, batch: int) -> Fit:
        if batch not in self._fits:
            graph = self.at(batch).constrained.graph
            self._say(f"batch {batch}: looking for a schedule")
            known = self._schedules.setdefault(wiring_of(graph), [])
            begin_s = time.monotonic()
            fit = find_fit(
                graph,
                self._budget.usable_bytes,
                known=known,
                # A schedule that merely fits says little about larger batches; the least peak
                # says the most.
                thrifty=True,
                # The first search gives a guess, the later ones decide.
                time_limit_s=min(
                    LEAST_MEMORY_LIMIT_S, max(1.0, self._left_s * (0.6 if known else 0.25))
                ),
                seed=self._request.options.seed,
            )
            if fit.least is not None:
                self._left_s -= time.monotonic() - begin_s
                self.least_of[batch] = fit.least
                known.append(fit.least.schedule)
            self._fits[batch] = fit
        return self._fits[batch]

    # -- which batch is next -------------------------------------------------------

    def _largest_of(
        self,
        fits: Callable[[int], bool],
        guess: Callable[[int], float],
        fitting: int,
        start: int,
    ) -> int:
        """The largest batch that fits, if ``fitting`` does and smaller batches fit if larger do.

        Tries the guesses from the captures so far, between the known bounds. If guesses
        keep missing, steps grow, and then the remaining range is halved.
        """
        too_large = self._largest + 1
        batch, misses = start, 0
        while True:
            if fits(batch):
                fitting = batch
            else:
                too_large = batch
            if too_large - fitting <= 1:
                return fitting
            guessed = guess(batch)
            misses = 0 if fitting < guessed < too_large else misses + 1
            if misses > 2 and too_large > self._largest:
                guessed = fitting + 2**misses
            elif misses > 2:
                guessed = (fitting + too_large) / 2
            batch = math.floor(min(max(guessed, fitting + 1), too_large - 1))

    def _guess_unplanned(self, batch: int) -> float:
        steps = {b: step.unplanned for b, step in self.captures.items()}
        return self._extrapolated(steps, batch, Schedule.keep_all)

    def _guess_planned(self, batch: int) -> float:
        steps = {b: step.constrained.graph for b, step in self.captures.items()}
        known = self._schedules[wiring_of(steps[batch])]
        return max(
            (self._extrapolated(steps, batch, lambda graph, s=s: s) for s in known),  # type: ignore[misc]
            default=self._extrapolated(steps, batch, Schedule.keep_all),
        )

    def _extrapolated(
        self,
        steps: dict[int, CostGraph],
        batch: int,
        schedule_of: Callable[[CostGraph], Schedule],
    ) -> float:
        """The largest batch at which the schedule fits, from the two captures nearest to it.

        Both have the wiring of the step at ``batch``. If there is only one with that
        wiring, all memory is assumed to grow in proportion.
        """
        graph = steps[batch]
        wiring = wiring_of(graph)
        schedule = schedule_of(graph)
        limit_bytes = self._budget.usable_bytes
        others = [b for b, other in steps.items() if b != batch and wiring_of(other) == wiring]
        if not others:
            lines = MemoryLines.in_proportion(schedule, (batch, graph))
        else:
            nearest = min(others, key=lambda b: abs(b - batch))
            lines = MemoryLines.through(schedule, (nearest, steps[nearest]), (batch, graph))
        return lines.largest_within(limit_bytes)

    def _not_even_one(self) -> InfeasibleBudgetError:
        least = self.least_of[1]
        budget = self._budget
        needed_bytes = budget.total_for(least.peak_bytes)
        return InfeasibleBudgetError(
            f"Not even a batch of 1 fits in {format_bytes(budget.total_bytes)} "
            f"({budget.total_bytes} bytes, {format_bytes(budget.headroom_bytes)} of it headroom), "
            f"not with a plan either: the least budget known to work for it is "
            f"{format_bytes(needed_bytes)} (budget_bytes={needed_bytes}). A shorter sequence, a "
            "smaller model or an optimizer with less state lowers it.",
            budget_bytes=budget.total_bytes,
            min_budget_bytes=needed_bytes,
            lower_bound_bytes=budget.total_for(least.lower_bound_bytes),
        )
