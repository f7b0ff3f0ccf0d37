"""Explain a plan. Read this first."""

from __future__ import annotations

import math

from graph_capture.cost_graph import MAX_TOTAL
from graph_capture.units import parse_bytes

from ..base.budget import read_percentage
from ..base.progress import ShowProgress, showing
from ..plan_record import PlanRecord
from .explanation import Explanation
from .holders import holders_at_peak
from .more_memory import with_more_memory
from .recomputations import recomputations_of

MORE = "10%"
"""How much more memory is asked about: a share of the plan's budget, or an amount."""

TIME_LIMIT_S = 10.0


def explain_plan(
    plan: PlanRecord,
    *,
    more: int | str = MORE,
    time_limit_s: float = TIME_LIMIT_S,
    progress: ShowProgress = None,
) -> Explanation:
    """See :meth:`planner.Plan.explain`."""
    if isinstance(time_limit_s, bool) or not 0 <= time_limit_s < math.inf:
        raise ValueError(f"time_limit_s must be finite and >= 0, got {time_limit_s!r}")
    extra_bytes = _amount(more, plan.budget_bytes)
    recomputations = recomputations_of(plan)
    bought = None
    if extra_bytes and recomputations:
        with showing(progress) as listener:
            bought = with_more_memory(
                plan, extra_bytes, time_limit_s=time_limit_s, progress=listener
            )
    until = plan.schedule.order[: plan.replay.peak_step + 1]
    operators = plan.graph.operators
    return Explanation(
        peak=plan.memory,
        peak_us=sum(operators[v].cost_ns for v in until) / 1e3,
        step_us=plan.predicted_step_us,
        workspace_bytes=operators[until[-1]].workspace_bytes,
        holders=holders_at_peak(plan),
        recomputations=recomputations,
        more=bought,
    )


def _amount(more: int | str, budget_bytes: int) -> int:
    if more == 0 and not isinstance(more, bool):
        return 0
    share = read_percentage(more)
    try:
        num_bytes = parse_bytes(more if share is None else share * budget_bytes)
        if num_bytes > MAX_TOTAL - budget_bytes:
            raise ValueError(f"a budget has at most {MAX_TOTAL} bytes")
    except ValueError as error:
        raise ValueError(
            f"more={more!r}: {error}; write more='10%' of the budget, more='100MB', or 0 for none"
        ) from error
    return num_bytes
