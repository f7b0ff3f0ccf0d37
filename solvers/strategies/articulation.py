"""Checkmate's generalizations of Chen's strategies to graphs that are not chains.

Jain et al., *Checkmate* (MLSys 2020, arXiv:1910.02653), Section 6.1 (its Table 1
names the baselines). Candidates to save are

*articulation points*: operators of the forward pass without which its undirected
graph falls apart, so that data flows through them; or
*linearized*: all forward operators, as if base order were a chain.

Of the candidates every ``floor(sqrt(n))``-th is saved (*sqrt n*), or those where a
segment exceeds a budget ``b`` (*greedy*, ``chen.py``). The rest is recomputed
lazily, each once (``saved.py``), but what follows the last saved operator stays:
the backward pass begins there. Where *greedy* saves nothing, nothing is recomputed.

Two things differ from the released code. It rematerializes a segment at once and
holds it to its end, what nobody reads included; laziness is in the baselines'
favour. And its linearized *sqrt n* counts all nodes, those of the backward pass,
too; here ``n`` is the number of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import networkx as nx

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule
from ..uniform import turning_point
from .chen import greedy_candidates, schedule_for_ends
from .strategy import Candidate, Propose, Strategy, StrategyError, StrategyOptions


def articulation_points(graph: CostGraph) -> list[int]:
    """Return the forward operators through which all data flows, in base order.

    They part the last operator of the undirected forward graph from the first.
    Operators that do not depend on any input of the model (random states, causal masks
    that all layers share) are left out of the graph: they carry no data, and would
    connect what data does not. The first is the first that reads an input; where no
    storage is called an input, all operators are data.

    Raises
    ------
    StrategyError
        When there are none.
    """
    data = _data_operators(graph, turning_point(graph))
    forward = nx.Graph()
    forward.add_nodes_from(data)
    for v in data:
        for k in graph.operators[v].inputs:
            producer = graph.storages[k].producer
            if producer in forward:
                forward.add_edge(producer, v)
    points = [
        v
        for v in sorted(nx.articulation_points(forward))
        if graph.operators[v].outputs and _parts(forward, v, data[0], data[-1])
    ]
    if not points:
        raise StrategyError("no articulation points: data flows around every forward operator")
    return points


def _data_operators(graph: CostGraph, turn: int) -> list[int]:
    """Return forward operators that depend on an input; all of them where no storage is an
    input."""
    found: list[int] = []
    carries = {k for k, s in enumerate(graph.storages) if s.category == "input"}
    for v, op in enumerate(graph.operators[:turn]):
        if not carries.isdisjoint(op.inputs):
            found.append(v)
            carries.update(op.outputs)
    return found or list(range(turn))


def _parts(forward: nx.Graph, v: int, first: int, last: int) -> bool:
    """Whether removing ``v`` disconnects ``first`` from ``last``."""
    if v in (first, last):
        return False
    rest = nx.restricted_view(forward, [v], [])
    return last not in nx.node_connected_component(rest, first)


def forward_operators(graph: CostGraph) -> list[int]:
    """Return all forward operators that make something, in base order.

    Raises
    ------
    StrategyError
        When there are none.
    """
    found = [v for v in range(turning_point(graph)) if graph.operators[v].outputs]
    if not found:
        raise StrategyError("no forward operators that make something")
    return found


def every_sqrt(graph: CostGraph, candidates: Sequence[int]) -> Schedule:
    """Save every ``floor(sqrt(n))``-th candidate, and what follows the last of them."""
    step = max(1, math.isqrt(len(candidates)))
    return schedule_for_ends(graph, candidates[step - 1 :: step], keep_tail=True)


def _sqrt(candidates: Callable[[CostGraph], list[int]]) -> Propose:
    def propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
        found = candidates(graph)
        step = max(1, math.isqrt(len(found)))
        yield Candidate(schedule=every_sqrt(graph, found), setting=f"every {step} of {len(found)}")

    return propose


def _greedy(candidates: Callable[[CostGraph], list[int]]) -> Propose:
    def propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
        yield from greedy_candidates(graph, candidates(graph), options, keep_tail=True)

    return propose


_SOURCE = "Jain et al. (Checkmate), arXiv:1910.02653, Section 6.1"

AP_SQRT = Strategy(
    name="ap_sqrt",
    summary="every sqrt(n)-th articulation point saved; the rest recomputed lazily",
    source=_SOURCE,
    propose=_sqrt(articulation_points),
)
AP_GREEDY = Strategy(
    name="ap_greedy",
    summary="articulation points saved where a segment exceeds b; the rest recomputed lazily",
    source=_SOURCE,
    propose=_greedy(articulation_points),
)
LINEARIZED_SQRT = Strategy(
    name="linearized_sqrt",
    summary="every sqrt(n)-th forward operator saved; the rest recomputed lazily",
    source=_SOURCE,
    propose=_sqrt(forward_operators),
)
LINEARIZED_GREEDY = Strategy(
    name="linearized_greedy",
    summary="forward operators saved where a segment exceeds b; the rest recomputed lazily",
    source=_SOURCE,
    propose=_greedy(forward_operators),
)
