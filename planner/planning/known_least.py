"""Search once for the least memory of a model's step.

The clock may cut the search. Its result is kept for as long as the model lives, so that
the least budget that an error names is found again when it is requested.
"""

from __future__ import annotations

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from graph_capture.cost_graph import CostGraph
from solvers.any_order.memory import least_memory_in_any_order
from solvers.least_memory import LeastMemory, least_memory

LEAST_MEMORY_LIMIT_S = 20.0
"""Of one search."""

_MAX_KEPT = 8  # of one model

_Key = tuple[CostGraph, int, bool]
_found = WeakIdKeyDictionary()  # of each model: what was found, by _Key


def known_least_memory(
    model: nn.Module, graph: CostGraph, seed: int, *, any_order: bool = False
) -> LeastMemory:
    """Return the least memory of a step of ``model``, searching for it where unknown.

    Parameters
    ----------
    any_order
        Whether first runs may leave eager's order.
    """
    known = already_found(model, graph, seed, any_order=any_order)
    if known is not None:
        return known
    if any_order:
        least = least_memory_in_any_order(
            graph,
            start=known_least_memory(model, graph, seed),
            time_limit_s=LEAST_MEMORY_LIMIT_S,
            seed=seed,
        )
    else:
        least = least_memory(graph, time_limit_s=LEAST_MEMORY_LIMIT_S, seed=seed)
    kept: dict[_Key, LeastMemory] = _found.setdefault(model, {})
    kept[graph, seed, any_order] = least
    while len(kept) > _MAX_KEPT:
        del kept[next(iter(kept))]
    return least


def already_found(
    model: nn.Module, graph: CostGraph, seed: int, *, any_order: bool = False
) -> LeastMemory | None:
    """Return what an earlier search found; ``None`` where there was none."""
    return _found.get(model, {}).get((graph, seed, any_order))
