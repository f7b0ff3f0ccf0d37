"""The least memory of a step, searched for once.

The search may be cut by its clock. What it found is kept, so that the least budget
that an error names is found again when it is asked for, of another instance of the
model as well.
"""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter

from graph_capture.cost_graph import CostGraph, Operator
from solvers.any_order.memory import least_memory_in_any_order
from solvers.least_memory import LeastMemory, least_memory
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.uniform import uniform_under_budget

LEAST_MEMORY_LIMIT_S = 20.0
"""Of the search for one step."""

_MAX_KEPT = 8

_Key = tuple[int, int, bool]
_DECIDES = attrgetter(*(f.name for f in fields(Operator) if f.name != "source"))
_found: dict[_Key, LeastMemory] = {}  # the one used last comes last; holds no graph


def known_least_memory(
    graph: CostGraph,
    seed: int,
    *,
    any_order: bool = False,
    time_limit_s: float = LEAST_MEMORY_LIMIT_S,
) -> LeastMemory:
    """The least memory of a step; searched for where it is not known.

    Parameters
    ----------
    any_order
        Whether first runs may leave eager's order.
    time_limit_s
        Of a search in eager's order.
    """
    least = already_found(graph, seed, any_order=any_order)
    if least is None and any_order:
        least = least_memory_in_any_order(
            graph,
            start=known_least_memory(graph, seed),
            time_limit_s=LEAST_MEMORY_LIMIT_S,
            seed=seed,
        )
    elif least is None:
        least = least_memory(graph, time_limit_s=time_limit_s, seed=seed)
    key = _key(graph, seed, any_order)
    _found.pop(key, None)
    _found[key] = least
    while len(_found) > _MAX_KEPT:
        _found.pop(next(iter(_found)), None)
    return least


def fits_easily(graph: CostGraph, budget_bytes: int) -> bool:
    """Whether keeping everything or a uniform schedule is within the budget.

    Then nobody needs to know the least memory.
    """
    return easy_schedule(graph, budget_bytes) is not None


def easy_schedule(graph: CostGraph, budget_bytes: int) -> Schedule | None:
    """The one that keeps everything, or a uniform one, if it is within the budget."""
    everything = Schedule.keep_all(graph)
    if replay(graph, everything).peak_bytes <= budget_bytes:
        return everything
    return uniform_under_budget(graph, budget_bytes)


def already_found(graph: CostGraph, seed: int, *, any_order: bool = False) -> LeastMemory | None:
    """What an earlier search found; ``None`` where there was none."""
    return _found.get(_key(graph, seed, any_order))


def _key(graph: CostGraph, seed: int, any_order: bool) -> _Key:
    """Of all of the graph but the lines of code, which may be those that call ``optimize``.

    Its fingerprint leaves out scratch and what the loss holds.
    """
    return hash((tuple(map(_DECIDES, graph.operators)), graph.storages)), seed, any_order
