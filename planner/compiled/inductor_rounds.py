"""Choose what Inductor gets: a partition whose compiled code stays within the budget.

The cost graph predicts fusion by rule, and the code that Inductor generates shows what it
takes. So the two are brought together in rounds: solve, emit, generate code and read its peak.
Where that is above the budget, the next solve gets as much less; where it is far below and
something is recomputed, as much more. PyTorch's own partition is tried first: where it fits,
nothing is to be solved.

Generated code is read on the CPU only. Elsewhere the plan goes by the rules of fusion, in one
round, and a warning says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

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
from .lowered_peak import lowered_extra_bytes
from .options import CompiledOptions
from .priced_step import PricedStep, unplanned_peak_bytes, without_unused_states
from .solve_step import solve_step

MOST_ROUNDS = 3
"""Times that a graph is solved and lowered; the second round ends it nearly always."""

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
    best: Lowered | None = None
    lowest = theirs
    target_bytes = usable_bytes
    for _ in range(MOST_ROUNDS):
        target_bytes = max(target_bytes, _least_bytes(priced, target_bytes, options.solving.seed))
        target = Budget(total_bytes=target_bytes, headroom_bytes=0)
        result = solve_step(priced, target, options.solving)
        assert result.schedule is not None
        forward, backward = emit(priced, result.schedule)
        found = Lowered(
            forward=forward,
            backward=backward,
            peak_bytes=lower(forward, backward),
            schedule=result.schedule,
            result=result,
        )
        predicted_bytes = replay(
            without_unused_states(priced, result.schedule), result.schedule
        ).peak_bytes
        if found.peak_bytes < lowest.peak_bytes:
            lowest = found
        over_bytes = found.peak_bytes - usable_bytes
        if over_bytes <= 0 and (best is None or _cost_ns(found) < _cost_ns(best)):
            best = found
        if over_bytes <= 0 and _cost_ns(found) <= priced.graph.base_cost_ns:
            break
        if over_bytes > 0 and best is not None:
            break
        if 0 <= -over_bytes <= WORTH_A_ROUND * usable_bytes:
            break
        next_bytes = min(target_bytes, predicted_bytes) - over_bytes
        if next_bytes == target_bytes:
            break
        target_bytes = next_bytes
    if best is None:
        raise _nothing_fits(budget, lowest)
    return best, theirs


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


def _least_bytes(priced: PricedStep, target_bytes: int, seed: int) -> int:
    """The least that the rules of fusion allow for; compiled code may take less."""
    if replay(priced.graph, Schedule.keep_all(priced.graph)).peak_bytes <= target_bytes:
        return 0
    return known_least_memory(priced.graph, seed).peak_bytes


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
