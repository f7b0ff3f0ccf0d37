"""Segments that are recomputed in one go, as ``torch.utils.checkpoint`` does.

A *segment* is a set of forward operators. What crosses its border is saved: what
it reads from outside, and what forward operators outside of it read. What it
makes for itself is dropped at its last use in the forward pass. Just before the
first backward operator that reads something dropped, the segment's forward part
runs again in base order, whole, and what the backward pass reads of it stays
until then.

*Early stop* (the default of ``torch.utils.checkpoint`` without reentrance) ends
the recomputation once everything that the backward pass wants is there; the
reentrant form, Megatron's among it, runs to the segment's end.

Two things differ from what happens in PyTorch. An operator all of whose
outputs are in the user's hands is not run again (Transformers, too, passes no
cache to a layer that it recomputes). And the saved boundary is read where
PyTorch's hooks would run a segment's last operator again because it saves its
own output. Both are in the baseline's favour. Pinned operators never run again;
what they make is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule
from ..uniform import turning_point
from .runs import Runs, last_uses
from .strategy import StrategyError


def schedule_for_segments(
    graph: CostGraph,
    segments: Sequence[Iterable[int]],
    *,
    saved: Iterable[int] = (),
    early_stop: bool = True,
) -> Schedule:
    """Return the schedule that recomputes each of ``segments`` when the backward pass reaches it.

    Parameters
    ----------
    segments
        Forward operators of each segment; segments do not overlap. What is in no
        segment is saved as autograd would.
    saved
        Storages that are saved although they lie inside a segment. An operator
        all of whose outputs are saved does not run again (selective activation
        checkpointing takes them from its cache).
    early_stop
        See the module's docstring.

    Raises
    ------
    StrategyError
        When a segment holds something other than a forward operator, or two overlap.
    """
    turn = turning_point(graph)
    owner = _owners(segments, turn)
    runs = Runs(graph)
    last = last_uses(graph)
    at_hand = runs.fixed | set(saved)
    dropped = _inner_storages(graph, owner, turn) - at_hand
    reruns = []
    for i, segment in enumerate(segments):
        wanted = {
            v
            for v in segment
            if any(k in dropped and last[k] >= turn for k in graph.operators[v].outputs)
        }
        end = max(wanted, default=-1) if early_stop else turn
        reruns.append(
            [
                v
                for v in sorted(set(segment))
                if v <= end
                and graph.operators[v].pinned is None
                and not at_hand.issuperset(graph.operators[v].outputs)
            ]
            if wanted
            else []
        )
        assert all(owner[v] == i for v in reruns[-1])
    for v in range(turn):
        runs.run(v)
    runs.at_hand -= dropped
    for v in range(turn, graph.num_operators):
        for i in sorted({owner[runs.producer(k)] for k in runs.missing(v)}):
            for u in reruns[i]:
                runs.run(u)
        runs.run(v)
    return runs.schedule()


def _owners(segments: Sequence[Iterable[int]], turn: int) -> dict[int, int]:
    """The segment of each operator that is in one."""
    owner: dict[int, int] = {}
    for i, segment in enumerate(segments):
        for v in segment:
            if not 0 <= v < turn:
                raise StrategyError(f"segment {i} holds operator {v}; forward ones end at {turn}")
            if owner.setdefault(v, i) != i:
                raise StrategyError(f"operator {v} is in segments {owner[v]} and {i}")
    return owner


def _inner_storages(graph: CostGraph, owner: dict[int, int], turn: int) -> set[int]:
    """Storages that only their own segment reads in the forward pass."""
    return {
        k
        for v, i in owner.items()
        for k in graph.operators[v].outputs
        if all(owner.get(u) == i for u in graph.consumers[k] if u < turn)
    }
