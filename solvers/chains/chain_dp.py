"""Dynamic programming on a chain of blocks with menus: schedules that recompute repeatedly.

1. Find the chain (``chains/chain.py``), block by block (``chains/blocks.py``).
2. Make the menu of each block (``chains/menu.py``); equal blocks share one.
3. Solve for all stretches of blocks and amounts of memory (``chains/table.py``).
4. Turn the decisions into operators, and replay (``chains/problem.py``).

Where the blocks repeat (the layers of a network), the dynamic program is run for the
finest chain, for one block per layer, and, if there is time, for one block per two
layers: fine blocks allow more splits; coarse ones may save something inside without
saving what crosses their middle.

On a chain of unit blocks without menus this is Griewank and Walther's revolve; without
menus on any chain it is rotor as published (``chains/rotor.py``). Guarantee: the best
persistent schedule of the chain for the menus found, up to the slots. Where the graph
is not a pure chain, nothing beyond what the replay says. First runs keep the base
order.

Known imperfections: boundaries are saved and dropped whole, menus come from
annealing, and operators of the backward pass run again only within their block.
A short annealing from the schedule mostly finds what is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays, graph_arrays
from ..checked import checked_budget
from ..uniform import turning_point
from .blocks import Block, Held, cut_out
from .chain import Chain, coarsen, find_chain
from .menu import Option
from .problem import ChainOutcome, ChainProblem, no_schedule

__all__ = ["ChainOutcome", "chain_dp", "find_period", "is_plain_chain"]

MENU_SHARE = 0.7
"""Of the time for a chain, what the search for menus may take."""
PLAIN_OPERATORS = 4
"""Operators a block, forward and backward, up to which there is no menu to search."""
MOST_BLOCKS = 250
"""The table's time grows with the cube of the blocks."""


def chain_dp(
    graph: CostGraph,
    budget_bytes: int,
    *,
    time_limit_s: float,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> ChainOutcome:
    """Find the fastest schedule of a chain within ``budget_bytes``.

    Parameters
    ----------
    time_limit_s
        Most of it goes to the menus; the rest sets the number of slots.
        Compiling, some seconds after an installation, is not covered.
    seed
        For the search of the menus. The same seed gives the same schedule unless the
        time limit cuts it.
    stop
        Ends the search soon when another thread sets it.
    """
    budget_bytes = checked_budget(budget_bytes)
    deadline_s = time.monotonic() + time_limit_s
    g = graph_arrays(graph)
    finest = find_chain(g, turning_point(graph))
    if finest is None:
        return no_schedule(0, "not a chain: hardly any position is crossed by one storage alone")
    menus: dict[Hashable, tuple[Option, ...]] = {}
    held = Held(g, finest)
    blocks = [cut_out(graph, g, finest, held, i) for i in range(finest.num_blocks)]
    chains = small_enough(g, [finest, *_coarser(g, finest, blocks)])
    best: ChainOutcome | None = None
    begin_s = time.monotonic()
    for n, chain in enumerate(chains):
        now_s = time.monotonic()
        left_s = deadline_s - now_s
        if stop is not None and stop.is_set():
            break
        if n > 1 and left_s < now_s - begin_s:
            break  # larger blocks take longer than those before
        begin_s = now_s
        share_s = left_s / 3 if n == 0 and len(chains) > 1 else left_s
        problem = ChainProblem(graph, g, chain)
        problem.add_menus(menus, now_s + MENU_SHARE * share_s, seed, stop)
        outcome = problem.solve(budget_bytes, (1 - MENU_SHARE) * share_s)
        if best is None or _is_better(outcome, best):
            best = outcome
    return best if best is not None else no_schedule(finest.num_blocks, "no time")


def is_plain_chain(graph: CostGraph) -> bool:
    """Whether blocks are too small to need menus, so that the dynamic program takes no time."""
    g = graph_arrays(graph)
    chain = find_chain(g, turning_point(graph))
    return chain is not None and g.num_operators <= PLAIN_OPERATORS * chain.num_blocks


def _is_better(a: ChainOutcome, b: ChainOutcome) -> bool:
    return a.cost_ns is not None and (b.cost_ns is None or a.cost_ns < b.cost_ns)


def small_enough(g: GraphArrays, chains: Sequence[Chain]) -> list[Chain]:
    """Drop chains of too many blocks; if all have too many, join blocks of the first one."""
    small = [chain for chain in chains if chain.num_blocks <= MOST_BLOCKS]
    if small:
        return small
    every = -(-chains[0].num_blocks // MOST_BLOCKS)
    return [coarsen(g, chains[0], chains[0].cuts[::every])]


def _coarser(g: GraphArrays, chain: Chain, blocks: Sequence[Block]) -> list[Chain]:
    """Return chains with one block per period and per two, if blocks repeat with a period above
    1."""
    period, repeats = find_period([block.key() for block in blocks])
    if period == 1:
        return []
    inside = range(repeats[0], repeats[-1] + period + 1)
    boundary_bytes = [int(g.size[list(ks)].sum()) for ks in chain.boundaries]
    phase = min(range(period), key=lambda r: sum(boundary_bytes[i] for i in inside[r::period]))
    chains = []
    for step in (period, 2 * period):
        wanted = set(range(chain.num_blocks)).difference(inside).union(inside[phase::step])
        chains.append(coarsen(g, chain, [chain.cuts[i] for i in wanted]))
    return chains


def find_period(keys: Sequence[Hashable]) -> tuple[int, list[int]]:
    """Find the shortest distance at which most keys repeat, and the positions that repeat.

    Examples
    --------
    >>> find_period(["in", "a", "b", "a", "b", "a", "b", "out"])
    (2, [1, 2, 3, 4])
    """
    best: tuple[int, list[int]] = (1, [])
    for period in range(1, max(1, len(keys) // 3) + 1):
        repeats = [i for i in range(len(keys) - period) if keys[i] == keys[i + period]]
        if len(repeats) > len(best[1]) + period:
            best = (period, repeats)
    return best
