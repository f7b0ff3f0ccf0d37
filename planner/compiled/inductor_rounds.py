"""Choose what Inductor gets: a partition whose compiled code stays within the budget.

The cost graph predicts fusion by rule. What a schedule counts on is then held
(:mod:`planner.compiled.held_fusion`), and the code that Inductor generates shows what it takes.
So the two are brought together in rounds: solve, emit, generate code and read its peak. Where
that is above the budget, the next solve gets as much less; where it is far below and something
is recomputed, as much more; between a target that was too high and one that fits, the middle.
PyTorch's own partition is tried first: where it fits, nothing is to be solved. Before a budget
is refused, schedules of the least memory are read, which do not depend on the budget: so what
the error names as the least is found again.

Generated code is read on the CPU only. Elsewhere the plan goes by the rules of fusion, in one
round, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import GraphModule

from graph_capture.units import format_bytes
from solvers.replay import replay
from solvers.result import SolveResult
from solvers.schedule import Schedule

from ..base.budget import Budget
from ..errors import InfeasibleBudgetError, PlanWarning
from ..planning.known_least import known_least_memory
from .emit import emit
from .held_fusion import WithinMemory
from .lowered_peak import lowered_extra_bytes
from .options import CompiledOptions
from .priced_step import PricedStep, unplanned_peak_bytes
from .solve_step import solve_step

NEAR_THE_LEAST = (1.0, 1.02, 1.05)
"""Shares of the least predicted memory that are solved for before a budget is refused."""

WORTH_A_ROUND = 0.02
"""Share of the budget that must be unused for another round of a plan that recomputes."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A partition, and what Inductor makes of it, or is expected to.

    Parameters
    ----------
    forward, backward
        The two graphs.
    peak_bytes
        Of the compiled step, resident tensors included.
    is_read
        Whether the peak is that of the generated code.
    schedule
        Of the priced step; ``None`` for PyTorch's own partition.
    result
        Of the solver; ``None`` likewise.
    """

    forward: GraphModule
    backward: GraphModule
    peak_bytes: int
    is_read: bool = True
    schedule: Schedule | None = None
    result: SolveResult | None = None


def choose(
    priced: PricedStep,
    budget: Budget,
    options: CompiledOptions,
    own: tuple[GraphModule, GraphModule],
) -> tuple[Lowered, Lowered]:
    """Return the chosen partition, and the one without a budget.

    Parameters
    ----------
    own
        PyTorch's partition of the same graph.

    Raises
    ------
    InfeasibleBudgetError
        When no partition that was found stays within the budget.
    """
    if not can_be_read(priced.device):
        warnings.warn(BY_RULE, PlanWarning, stacklevel=2)
        return _by_rule(priced, budget, options, own)
    resident_bytes, num_outputs = priced.graph.resident_bytes, len(priced.step.outputs)

    def lower(forward: GraphModule, backward: GraphModule) -> int:
        return resident_bytes + lowered_extra_bytes(forward, backward, num_outputs)

    usable_bytes = budget.usable_bytes
    theirs = Lowered(forward=own[0], backward=own[1], peak_bytes=lower(*own))
    if theirs.peak_bytes <= usable_bytes:
        return theirs, theirs
    search = _Search(priced, options, lower)
    best = search.within(usable_bytes)
    if best is None:
        near = search.near_the_least()
        fitting = [found for found in near if found.peak_bytes <= usable_bytes]
        if not fitting:
            raise _nothing_fits(budget, min((*near, theirs), key=lambda found: found.peak_bytes))
        best = min(fitting, key=_cost_ns)
    return best, theirs


class _Search:
    """Solves for targets and reads what comes of them, each once."""

    def __init__(
        self,
        priced: PricedStep,
        options: CompiledOptions,
        lower: Callable[[GraphModule, GraphModule], int],
    ) -> None:
        self._priced, self._options, self._lower = priced, options, lower
        self._found: dict[int, Lowered] = {}
        self._most_bytes = replay(priced.graph, Schedule.keep_all(priced.graph)).peak_bytes

    def within(self, usable_bytes: int) -> Lowered | None:
        """The fastest plan found whose compiled code takes no more, or ``None``."""
        best: Lowered | None = None
        fits_bytes, too_high_bytes = 0, self._most_bytes + 1
        target_bytes = usable_bytes
        for _ in range(self._options.rounds):
            target_bytes = self._allowed(target_bytes)
            if target_bytes in self._found:
                break
            found = self._at(target_bytes)
            over_bytes = found.peak_bytes - usable_bytes
            if over_bytes <= 0:
                fits_bytes = max(fits_bytes, target_bytes)
                if best is None or _cost_ns(found) < _cost_ns(best):
                    best = found
                unused = -over_bytes / usable_bytes
                if unused <= WORTH_A_ROUND or _cost_ns(found) <= self._priced.graph.base_cost_ns:
                    break
            else:
                too_high_bytes = min(too_high_bytes, target_bytes)
            target_bytes -= over_bytes
            if fits_bytes and not fits_bytes < target_bytes < too_high_bytes:
                target_bytes = (fits_bytes + too_high_bytes) // 2
            if too_high_bytes - fits_bytes <= WORTH_A_ROUND * usable_bytes:
                break
        return best

    def near_the_least(self) -> list[Lowered]:
        """What comes of the least memory that the rules of fusion allow for, and a little more."""
        least_bytes = self._least_bytes
        return [self._at(self._allowed(round(f * least_bytes))) for f in NEAR_THE_LEAST]

    @cached_property
    def _least_bytes(self) -> int:
        return known_least_memory(self._priced.graph, self._options.solving.seed).peak_bytes

    def _allowed(self, target_bytes: int) -> int:
        if self._most_bytes <= target_bytes:
            return self._most_bytes
        return max(target_bytes, self._least_bytes)

    def _at(self, target_bytes: int) -> Lowered:
        if target_bytes not in self._found:
            self._found[target_bytes] = self._solved(target_bytes)
        return self._found[target_bytes]

    def _solved(self, target_bytes: int) -> Lowered:
        target = Budget(total_bytes=target_bytes, headroom_bytes=0)
        result = solve_step(self._priced, target, self._options.solving)
        assert result.schedule is not None
        replayed = replay(self._priced.graph, result.schedule)
        rules = WithinMemory(memory_bytes=replayed.memory_bytes, limit_bytes=target_bytes)
        forward, backward = emit(self._priced, result.schedule, rules)
        return Lowered(
            forward=forward,
            backward=backward,
            peak_bytes=self._lower(forward, backward),
            schedule=result.schedule,
            result=result,
        )


BY_RULE = (
    "the code that Inductor generates is read back on the CPU only: on this device the plan's peak "
    "comes from kernels fused by rule and may be off; measure a step, and leave headroom="
)


def can_be_read(device: torch.device) -> bool:
    """Whether generated code can be run without its kernels, which shows its peak."""
    return device.type == "cpu"


def _by_rule(
    priced: PricedStep,
    budget: Budget,
    options: CompiledOptions,
    own: tuple[GraphModule, GraphModule],
) -> tuple[Lowered, Lowered]:
    """One solve, whose peak is the cost graph's."""
    everything_bytes = unplanned_peak_bytes(priced)
    theirs = Lowered(forward=own[0], backward=own[1], peak_bytes=everything_bytes, is_read=False)
    if everything_bytes <= budget.usable_bytes:
        return theirs, theirs
    result = solve_step(priced, budget, options.solving)
    assert result.schedule is not None
    forward, backward = emit(priced, result.schedule)
    found = Lowered(
        forward=forward,
        backward=backward,
        peak_bytes=replay(priced.graph, result.schedule).peak_bytes,
        is_read=False,
        schedule=result.schedule,
        result=result,
    )
    return found, theirs


def _cost_ns(found: Lowered) -> int:
    assert found.result is not None
    assert found.result.cost_ns is not None
    return found.result.cost_ns


def _nothing_fits(budget: Budget, lowest: Lowered) -> InfeasibleBudgetError:
    min_budget_bytes = budget.total_for(lowest.peak_bytes)
    return InfeasibleBudgetError(
        f"No partition that was found stays within {format_bytes(budget.total_bytes)} "
        f"({budget.total_bytes} bytes) once Inductor has compiled it. The least budget known to "
        f"work is {format_bytes(min_budget_bytes)} (budget_bytes={min_budget_bytes}); whether a "
        "lower one exists is not proven. A smaller batch or a shorter sequence lowers it.",
        budget_bytes=budget.total_bytes,
        min_budget_bytes=min_budget_bytes,
        lower_bound_bytes=0,
    )


__all__ = ["Lowered", "choose"]
