"""Turn a set of saved storages into the schedule that recomputes the rest lazily.

Most policies of the field only say what to keep from the forward to the backward pass:
the matrix products, every k-th layer, what a minimum cut selects. What runs again, and
when, follows from that:

- the forward pass runs in base order, and what is not saved dies at its last
  use in it;
- just before an operator of the backward pass runs, what it is missing is recomputed, with whatever
  that is missing in turn, in base order;
- what was recomputed stays until its last use in the backward pass, reads by
  other recomputations included, so nothing runs a third time.

This is how a partitioned joint graph runs (``torch.compile``), and how the
mirrored graph of Chen et al. (arXiv:1604.06174, Algorithm 2) does. What
``torch.utils.checkpoint`` does is in ``segments.py``.

Kept storages, outputs of pinned operators and of the loss in the user's hands
are always there. The backward pass and the optimizer run once.
"""

from __future__ import annotations

from collections.abc import Iterable

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule
from ..uniform import turning_point
from .runs import Runs
from .strategy import Candidate, Strategy, StrategyError, StrategyOptions


def schedule_for_saved(
    graph: CostGraph, saved: Iterable[int] = (), *, operators: Iterable[int] = ()
) -> Schedule:
    """Return the schedule that keeps ``saved`` from forward to backward and recomputes the rest.

    Parameters
    ----------
    saved
        Storages that are kept to their last use. Naming storages of the backward pass,
        or resident ones, changes nothing.
    operators
        Operators all of whose outputs are saved, in addition to ``saved``.

    Raises
    ------
    StrategyError
        When an index names no storage or no operator.

    Examples
    --------
    >>> from graph_capture.cost_graph import CostGraph, Operator, Storage
    >>> x, y, z = (Storage(name=n, size_bytes=1, producer=i) for i, n in enumerate("xyz"))
    >>> step = CostGraph(
    ...     (
    ...         Operator(name="f0", outputs=(0,)),
    ...         Operator(name="f1", inputs=(0,), outputs=(1,)),
    ...         Operator(name="b1", inputs=(0, 1), outputs=(2,), phase="backward"),
    ...     ),
    ...     (x, y, z),
    ... )
    >>> schedule_for_saved(step, saved=[1]).order
    (0, 1, 0, 2)
    """
    keep = set(saved)
    wrong = [k for k in keep if not 0 <= k < len(graph.storages)]
    if wrong:
        raise StrategyError(
            f"saved names storage {min(wrong)}; the graph has {len(graph.storages)}"
        )
    for v in operators:
        if not 0 <= v < graph.num_operators:
            raise StrategyError(f"operators names {v}; the graph has {graph.num_operators}")
        keep.update(graph.operators[v].outputs)
    turn = turning_point(graph)
    runs = Runs(graph)
    for v in range(turn):
        runs.run(v)
    runs.keep_only(keep)
    for v in range(turn, graph.num_operators):
        runs.recompute(runs.inputs[v])
        runs.run(v)
    return runs.schedule()


def saved_set_strategy(
    name: str,
    saved: Iterable[int],
    *,
    summary: str = "a given set of storages is saved, the rest recomputed lazily",
    source: str = "a saved set that was given",
) -> Strategy:
    """Return a strategy with one candidate, for a set that another tool chose."""
    storages = frozenset(saved)

    def propose(graph: CostGraph, options: StrategyOptions) -> list[Candidate]:
        return [Candidate(schedule=schedule_for_saved(graph, storages))]

    return Strategy(name=name, summary=summary, source=source, propose=propose)
