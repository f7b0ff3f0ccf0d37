"""Plan one joint graph: price it, solve, and split it; for eager kernels or for Inductor."""

from __future__ import annotations

from collections.abc import Callable

from graph_capture.costs.devices import device_for
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.budget import parse_headroom
from .choose import Graphs, choose
from .compiled_plan import CompiledPlan
from .emit import emit
from .fused_groups import fuse, kernel_ns
from .joint_step import JointStep
from .lowered_peak import handed_over_bytes
from .options import CompiledOptions
from .priced_step import device_of, price_step, unplanned_peak_bytes, without_unused_states
from .readings import name_of
from .repeated_calls import (
    RepeatedCalls,
    counting,
    counting_everything,
    held_by_others,
    saved_bytes,
    share_among,
)
from .solve_step import solve_step
from .subgraphs import warn_of_loops

FITS_AS_IT_IS = "PyTorch's own partition fits, nothing was solved"
OF_FUSION = "bound and gap speak of kernels fused by rule"
OF_REPEATED_CALLS = "bound and gap speak of calls that save no more than these"
PEAK_IS_READ = "the peak is that of the code that Inductor generates"
PEAK_BY_RULE = "the peak is predicted by rule, not read from Inductor's code"


def for_eager_kernels(
    step: JointStep, options: CompiledOptions, calls: RepeatedCalls
) -> tuple[CompiledPlan, Graphs]:
    priced = price_step(
        step,
        resident_bytes=options.resident_bytes,
        releases_outputs=options.outputs == "released",
    )
    budget = parse_headroom(options.headroom, options.budget_bytes, priced.device.type)
    shared = share_among(priced, calls, budget, options.solving)
    result = solve_step(shared.priced, budget, options.solving, hint=shared.schedule)
    assert result.schedule is not None
    counted = counting(priced, calls, saved_bytes(priced, result.schedule))
    graph = without_unused_states(counted, result.schedule)
    plan = CompiledPlan(
        graph=graph,
        schedule=result.schedule,
        turn=priced.turn,
        lower=options.lower,
        budget_bytes=options.budget_bytes,
        headroom_bytes=budget.headroom_bytes,
        predicted_peak_bytes=replay(graph, result.schedule).peak_bytes,
        unplanned_peak_bytes=unplanned_peak_bytes(counting_everything(priced, calls)),
        lower_bound_ns=result.lower_bound_ns,
        status=result.status,
        solve_s=result.solve_s,
        notes=() if calls.num_calls == 1 else (OF_REPEATED_CALLS,),
    )
    return plan, emit(priced, result.schedule)


def for_inductor(
    step: JointStep, options: CompiledOptions, calls: RepeatedCalls, own: Callable[[], Graphs]
) -> tuple[CompiledPlan, Graphs]:
    warn_of_loops(step.module, step.calls)
    fused = fuse(step)
    device = device_for(device_of(step).type)
    priced = price_step(
        step,
        groups=fused.groups,
        inner=fused.inner,
        replays_draws=False,
        resident_bytes=options.resident_bytes,
        releases_outputs=options.outputs == "released",
        group_ns=lambda group, outside: kernel_ns(group, outside, device),
    )
    budget = parse_headroom(options.headroom, options.budget_bytes, priced.device.type)
    kept_for = name_of(priced) if calls.num_calls > 1 else None
    shared = share_among(priced, calls, budget, options.solving, kept_for=kept_for)
    lowered = choose(shared.priced, budget, options, own)
    chosen = lowered.choice
    solved = chosen.schedule
    counted = counting(priced, calls, handed_over_bytes(lowered.forward))
    too_much_bytes = held_by_others(shared.priced.graph) - held_by_others(counted.graph)
    notes = [FITS_AS_IT_IS if solved is None else OF_FUSION]
    notes.append(PEAK_IS_READ if lowered.is_read else PEAK_BY_RULE)
    if calls.num_calls > 1:
        notes.append(OF_REPEATED_CALLS)
    plan = CompiledPlan(
        graph=counted.graph,
        schedule=Schedule.keep_all(priced.graph) if solved is None else solved,
        turn=priced.turn,
        lower=options.lower,
        budget_bytes=options.budget_bytes,
        headroom_bytes=budget.headroom_bytes,
        predicted_peak_bytes=chosen.peak_bytes - too_much_bytes,
        unplanned_peak_bytes=(
            chosen.unplanned_peak_bytes
            if calls.num_calls == 1
            else unplanned_peak_bytes(counting_everything(priced, calls))
        ),
        lower_bound_ns=chosen.lower_bound_ns,
        status=chosen.status,
        solve_s=lowered.solve_s,
        notes=tuple(notes),
    )
    return plan, (lowered.forward, lowered.backward)


__all__ = ["for_eager_kernels", "for_inductor"]
