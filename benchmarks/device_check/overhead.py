"""Compare predicted step times and overheads with measured ones."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError, Plan
from planner.measuring.measure import measure_pair, quartiles
from solvers.replay import replay

from .bench import Bench, Where, release

COST_MODELS = ("roofline", "profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """The time of recomputation: one plan, priced by every cost model, and measured.

    Parameters
    ----------
    model
        Name of the subject.
    where
        The budget, as requested.
    budget_bytes
        The same in bytes.
    planned_by
        The cost model with which the plan was made.
    infeasible
        Why there is no plan; ``""`` if there is one.
    predicted
        Overhead of this plan's schedule under each cost model.
    predicted_step_us
        Time of the unplanned step under each cost model, in microseconds.
    measured
        Planned step over eager step, minus one: the median of paired runs.
    quartiles
        Of the same.
    eager_us, planned_us
        Medians, in microseconds.
    num_pairs
        How many pairs ran.
    """

    model: str
    where: Where
    budget_bytes: int
    planned_by: str
    infeasible: str = ""
    predicted: dict[str, float]
    predicted_step_us: dict[str, float]
    measured: float = float("nan")
    quartiles: tuple[float, float] = (float("nan"), float("nan"))
    eager_us: float = float("nan")
    planned_us: float = float("nan")
    num_pairs: int = 0


def check_overhead(
    bench: Bench,
    where: Where,
    *,
    planned_by: str = "roofline",
    priced_by: tuple[str, ...] = COST_MODELS,
    num_pairs: int = 12,
) -> Overhead:
    """Time planned and eager steps in turn, on one set of weights, without the optimizer.

    The optimizer's step is the same in both and would only dilute the ratio. Predictions
    are also relative to the step without it.

    Parameters
    ----------
    where
        See :meth:`Bench.budget_bytes`.
    planned_by
        The cost model of the plan.
    priced_by
        The cost models whose predictions are reported.
    """
    budget_bytes = bench.budget_bytes(where)
    steps_us = {name: step_us(bench.unplanned(name)) for name in priced_by}
    try:
        plan = bench.plan(budget_bytes, planned_by)
    except InfeasibleBudgetError as error:
        return Overhead(
            model=bench.subject.name,
            where=where,
            budget_bytes=budget_bytes,
            planned_by=planned_by,
            infeasible=f"the least feasible is {format_bytes(error.min_budget_bytes)}",
            predicted={},
            predicted_step_us=steps_us,
        )
    predicted = {name: predicted_overhead(plan, bench.unplanned(name)) for name in priced_by}
    release(bench.device)
    with bench.applied(plan) as model:
        eager = bench.step_of(model, planned=False)
        planned = bench.step_of(model, planned=True)
        timing = measure_pair(eager, planned, repeats=num_pairs, device=bench.device)
    model.zero_grad(set_to_none=True)
    low, high = quartiles(timing.ratios)
    return Overhead(
        model=bench.subject.name,
        where=where,
        budget_bytes=budget_bytes,
        planned_by=planned_by,
        predicted=predicted,
        predicted_step_us=steps_us,
        measured=timing.ratio - 1,
        quartiles=(low - 1, high - 1),
        eager_us=statistics.median(timing.first_us),
        planned_us=statistics.median(timing.second_us),
        num_pairs=num_pairs,
    )


def predicted_overhead(plan: Plan, priced: Plan) -> float:
    """Overhead of a plan's schedule under the costs that another plan of the same step carries.

    Raises
    ------
    ValueError
        When the two are not plans of the same step.
    """
    if plan.fingerprint != priced.fingerprint:
        raise ValueError(
            f"plans of two steps: fingerprints {plan.fingerprint} and {priced.fingerprint}; "
            "costs must not change what is captured"
        )
    optimizer_us = optimizer_step_us(priced)
    planned_us = replay(priced.graph, plan.schedule).cost_ns / 1e3 - optimizer_us
    return planned_us / step_us(priced) - 1


def step_us(plan: Plan) -> float:
    """Predicted time of the unplanned step without its optimizer, in microseconds."""
    return plan.baseline_step_us - optimizer_step_us(plan)


def optimizer_step_us(plan: Plan) -> float:
    """Predicted time of the optimizer's own step, in microseconds."""
    return sum(op.cost_ns for op in plan.graph.operators if op.phase == "optimizer") / 1e3
