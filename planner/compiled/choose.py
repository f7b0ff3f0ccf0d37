"""Choose what Inductor gets: PyTorch's own partition where it fits, or the plan of a search.

A choice that an earlier process made of the same graph is taken again
(:mod:`planner.compiled.kept_choices`). Else PyTorch's own partition is tried first, unless what
forward hands to backward is too large already: where it fits, nothing is to be solved. The rest is
:mod:`planner.compiled.inductor_rounds`.

Generated code is read on the CPU only. Elsewhere the plan goes by the rules of fusion, in one
round, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from graph_capture.units import format_bytes
from graph_capture.without_collector import without_collector
from solvers.replay import replay
from solvers.result import SolveStatus

from ..base.budget import Budget
from ..errors import InfeasibleBudgetError, PlanWarning
from .emit import emit, emit_held
from .inductor_rounds import Search
from .kept_choices import Choice, keep_choice, place_of, read_choice
from .lowered_peak import handed_over_bytes, lowered_extra_bytes
from .options import CompiledOptions
from .priced_step import PricedStep, unplanned_peak_bytes
from .readings import name_of, peak_of
from .repeated_calls import needed_at_turn
from .solve_step import solve_step

OWN_MAY_FIT = 0.7
"""Share of the memory of keeping everything from which on PyTorch's own partition may fit: it was
seen to take from 75 % on."""

Graphs = tuple[GraphModule, GraphModule]


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A partition, and what Inductor makes of it, or is expected to.

    Parameters
    ----------
    forward, backward
        The two graphs.
    choice
        What was chosen, with the peak of the compiled step.
    is_read
        Whether the peak is that of the generated code.
    solve_s
        Seconds of solving, of all rounds; 0 where an earlier process has solved it.
    """

    forward: GraphModule
    backward: GraphModule
    choice: Choice
    is_read: bool
    solve_s: float = 0.0


@without_collector()  # Inductor makes many objects, and few of them are cycles
def choose(
    priced: PricedStep, budget: Budget, options: CompiledOptions, own: Callable[[], Graphs]
) -> Lowered:
    """Return the chosen partition.

    Parameters
    ----------
    own
        Makes PyTorch's partition of the same graph.

    Raises
    ------
    InfeasibleBudgetError
        When no partition that was found stays within the budget.
    """
    is_read = can_be_read(priced.device)
    if not is_read:
        warnings.warn(BY_RULE, PlanWarning, stacklevel=2)
    name = name_of(priced)
    place = place_of(name, is_read, budget.usable_bytes, options.rounds, options.solving)
    kept = None if place is None else read_choice(place, priced.graph, budget.usable_bytes)
    if kept is not None:
        if kept.schedule is None:
            forward, backward = own()
        elif is_read:
            forward, backward = emit_held(priced, kept.schedule)
        else:
            forward, backward = emit(priced, kept.schedule)
        return Lowered(forward=forward, backward=backward, choice=kept, is_read=is_read)
    if is_read:
        lowered = _by_reading(priced, budget, options, own, name)
    else:
        lowered = _by_rule(priced, budget, options, own)
    if place is not None:
        keep_choice(place, lowered.choice)
    return lowered


def can_be_read(device: torch.device) -> bool:
    """Whether generated code can be run without its kernels, which shows its peak."""
    return device.type == "cpu"


BY_RULE = (
    "the code that Inductor generates is read back on the CPU only: on this device the plan's peak "
    "comes from kernels fused by rule and may be off; measure a step, and leave headroom="
)


def _by_reading(
    priced: PricedStep,
    budget: Budget,
    options: CompiledOptions,
    own: Callable[[], Graphs],
    name: str,
) -> Lowered:
    resident_bytes, num_outputs = priced.graph.resident_bytes, len(priced.step.outputs)

    def lower(forward: GraphModule, backward: GraphModule) -> int:
        return resident_bytes + lowered_extra_bytes(
            forward, backward, num_outputs, releases_outputs=options.outputs == "released"
        )

    usable_bytes = budget.usable_bytes
    unplanned_bytes = unplanned_peak_bytes(priced)

    def read_own(forward: GraphModule, backward: GraphModule) -> tuple[Lowered, int]:
        """PyTorch's own partition, and what it needs."""
        peak_bytes = peak_of(name, None, lambda: lower(forward, backward))
        needed_bytes = max(peak_bytes, needed_at_turn(priced, handed_over_bytes(forward)))
        choice = _own_partition(priced, peak_bytes)
        lowered = Lowered(forward=forward, backward=backward, choice=choice, is_read=True)
        return lowered, needed_bytes

    theirs: tuple[Lowered, int] | None = None
    if usable_bytes >= OWN_MAY_FIT * unplanned_bytes:
        graphs = own()
        if resident_bytes + handed_over_bytes(graphs[0]) <= usable_bytes:
            lowered, needed_bytes = theirs = read_own(*graphs)
            if needed_bytes <= usable_bytes:
                return lowered
            unplanned_bytes = lowered.choice.peak_bytes
    search = Search(priced, options, name, lower)
    best = search.within(usable_bytes)
    if best is None:
        lowered, needed_bytes = theirs or read_own(*own())
        if needed_bytes <= usable_bytes:
            return lowered
        raise _nothing_fits(budget, min(needed_bytes, search.lowest_bytes))
    result = best.result
    assert result.schedule is not None
    forward, backward = emit_held(priced, result.schedule)
    choice = Choice(
        schedule=result.schedule,
        peak_bytes=best.peak_bytes,
        unplanned_peak_bytes=unplanned_bytes,
        lower_bound_ns=result.lower_bound_ns,
        status=result.status,
    )
    return Lowered(
        forward=forward, backward=backward, choice=choice, is_read=True, solve_s=search.solve_s
    )


def _by_rule(
    priced: PricedStep, budget: Budget, options: CompiledOptions, own: Callable[[], Graphs]
) -> Lowered:
    """One solve, whose peak is the cost graph's."""
    everything_bytes = unplanned_peak_bytes(priced)
    if everything_bytes <= budget.usable_bytes:
        forward, backward = own()
        choice = _own_partition(priced, everything_bytes)
        return Lowered(forward=forward, backward=backward, choice=choice, is_read=False)
    result = solve_step(priced, budget, options.solving)
    assert result.schedule is not None
    forward, backward = emit(priced, result.schedule)
    choice = Choice(
        schedule=result.schedule,
        peak_bytes=replay(priced.graph, result.schedule).peak_bytes,
        unplanned_peak_bytes=everything_bytes,
        lower_bound_ns=result.lower_bound_ns,
        status=result.status,
    )
    return Lowered(
        forward=forward, backward=backward, choice=choice, is_read=False, solve_s=result.solve_s
    )


def _own_partition(priced: PricedStep, peak_bytes: int) -> Choice:
    """PyTorch's own, which repeats only what costs nothing."""
    return Choice(
        schedule=None,
        peak_bytes=peak_bytes,
        unplanned_peak_bytes=peak_bytes,
        lower_bound_ns=priced.graph.base_cost_ns,
        status=SolveStatus.OPTIMAL,
    )


def _nothing_fits(budget: Budget, lowest_bytes: int) -> InfeasibleBudgetError:
    min_budget_bytes = budget.total_for(lowest_bytes)
    return InfeasibleBudgetError(
        f"No partition that was found stays within {format_bytes(budget.total_bytes)} "
        f"({budget.total_bytes} bytes) once Inductor has compiled it. The least budget known to "
        f"work is {format_bytes(min_budget_bytes)} (budget_bytes={min_budget_bytes}); whether a "
        "lower one exists is not proven. A smaller batch or a shorter sequence lowers it.",
        budget_bytes=budget.total_bytes,
        min_budget_bytes=min_budget_bytes,
        lower_bound_bytes=0,
    )


__all__ = ["BY_RULE", "Graphs", "Lowered", "can_be_read", "choose"]
