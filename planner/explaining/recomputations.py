"""What a plan runs again, by the line of the model that asks for it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ..plan_record import PlanRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputation:
    """Repeated runs of one line in one module.

    Parameters
    ----------
    module_path, source
        Where in the model; ``""`` where that is not known.
    calls
        What runs again, in the order of the step.
    num_runs
        How many runs beyond the first of each operator.
    time_us
        What they take together, in microseconds.
    """

    module_path: str
    source: str
    calls: tuple[str, ...]
    num_runs: int
    time_us: float


def recomputations_of(plan: PlanRecord) -> tuple[Recomputation, ...]:
    """Return what a plan runs again, the dearest first."""
    places: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for v, times in sorted(plan.schedule.recomputed().items()):
        operator = plan.graph.operators[v]
        places[operator.module_path, operator.source].append((v, times))
    operators = plan.graph.operators
    found = [
        Recomputation(
            module_path=module_path,
            source=source,
            calls=tuple(dict.fromkeys(operators[v].target or operators[v].name for v, _ in runs)),
            num_runs=sum(times for _, times in runs),
            time_us=sum(times * operators[v].cost_ns for v, times in runs) / 1e3,
        )
        for (module_path, source), runs in places.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.time_us))
