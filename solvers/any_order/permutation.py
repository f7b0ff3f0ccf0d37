"""The same step in another base order, and schedules carried between the two.

A *permutation* lists the operators of a graph in the order of another graph of
the same step: place ``i`` of the new base order is operator ``permutation[i]``
of the original. Storages keep their indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule


def first_runs(schedule: Schedule) -> tuple[int, ...]:
    """Return the permutation that makes the first runs of ``schedule`` the base order.

    Examples
    --------
    >>> first_runs(Schedule((0, 2, 0, 1)))
    (0, 2, 1)
    """
    return tuple(dict.fromkeys(schedule.order))


def permuted(graph: CostGraph, permutation: Sequence[int]) -> CostGraph:
    """Return ``graph`` with its operators in the order of ``permutation``.

    Raises
    ------
    ValueError
        When ``permutation`` misses an operator, breaks the data flow, or lets
        ordered operators change places.
    """
    if sorted(permutation) != list(range(graph.num_operators)):
        raise ValueError(f"no permutation of {graph.num_operators} operators")
    ordered = [v for v in permutation if graph.operators[v].ordered]
    if ordered != sorted(ordered):
        raise ValueError("ordered operators change places")
    place = {v: i for i, v in enumerate(permutation)}
    return CostGraph(
        tuple(graph.operators[v] for v in permutation),
        tuple(
            s if s.producer is None else replace(s, producer=place[s.producer])
            for s in graph.storages
        ),
    )


def relabelled(schedule: Schedule, permutation: Sequence[int]) -> Schedule:
    """Translate a schedule of the original graph into one of the permuted graph."""
    place = {v: i for i, v in enumerate(permutation)}
    return Schedule(tuple(place[v] for v in schedule.order))


def unpermuted(schedule: Schedule, permutation: Sequence[int]) -> Schedule:
    """Translate a schedule of the permuted graph into one of the original graph.

    Examples
    --------
    >>> unpermuted(Schedule((0, 1, 2, 1)), (0, 2, 1))
    Schedule(order=(0, 2, 1, 2))
    """
    return Schedule(tuple(permutation[i] for i in schedule.order))
