"""Settings that checkpoint layers and save the outputs of some calls in them.

This is what ``torch.utils.checkpoint.create_selective_checkpoint_contexts`` takes: one
answer for each kind of call, wherever it occurs in the layers. Its cache holds a saved
output until the layer runs again, whether or not somebody reads it in between.

An operator of the graph may stand for several calls that work on one block of memory in
turn (``aten.bmm.default+aten.add.out``). In eager mode the first of them has an output of
its own, which the cache holds beside the block; and where a later one writes in place,
PyTorch refuses to save the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from graph_capture.cost_graph import CostGraph, Operator
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies.blocks import Block, Blocks
from solvers.strategies.segments import schedule_for_segments

from .choice import Judge, Setting
from .layers import layer_names, spread

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of the layers, how many are checkpointed."""


def saving_calls(judge: Judge, blocks: Blocks) -> Iterator[Setting]:
    """A setting for each of :data:`SHARES`: those layers, and what is worth saving in them.

    Kinds of calls are taken in the order of the time that saving one of their bytes
    avoids, each if the step is better with it.
    """
    names = layer_names(blocks)
    for num in dict.fromkeys(max(1, round(share * len(names))) for share in SHARES):
        layers = set(spread(names)[:num])
        found = _saving(judge, [block for block in blocks.blocks if block.name in layers])
        yield replace(found, stack=names)


def _saving(judge: Judge, blocks: Sequence[Block]) -> Setting:
    graph = judge.plan.graph
    best = judge.judge(_setting(graph, blocks, ()))
    for call in calls_by_worth(graph, blocks):
        found = judge.judge(_setting(graph, blocks, (*best.setting.saved_calls, call)))
        if found.better_than(best):
            best = found
    return best.setting


def _setting(graph: CostGraph, blocks: Sequence[Block], calls: tuple[str, ...]) -> Setting:
    saved = {
        k
        for block in blocks
        for v in range(block.begin, block.end)
        if graph.operators[v].target in calls
        for k in graph.operators[v].outputs
    }
    segments = [range(block.begin, block.end) for block in blocks]
    schedule = schedule_for_segments(graph, segments, saved=saved)
    joined = [
        v for v in (v for segment in segments for v in segment) if _is_joined_with(graph, v, calls)
    ]
    return Setting(
        schedule=schedule,
        layers=tuple(dict.fromkeys(block.name for block in blocks)),
        saved_calls=tuple(sorted(calls)),
        cached_bytes=_cached_bytes(graph, schedule, segments, saved, joined),
    )


def _cached_bytes(
    graph: CostGraph,
    schedule: Schedule,
    segments: Sequence[range],
    saved: set[int],
    joined: Sequence[int],
) -> tuple[int, ...]:
    """Return what the caches hold during each run that the schedule does not."""
    owner = {v: i for i, segment in enumerate(segments) for v in segment}
    again = [len(schedule.order)] * len(segments)
    seen: set[int] = set()
    for run, v in enumerate(schedule.order):
        if v in seen and v in owner:
            again[owner[v]] = min(again[owner[v]], run)
        seen.add(v)
    delta = [0] * (len(schedule.order) + 1)
    for k, born, last in replay(graph, schedule).live:
        producer = graph.storages[k].producer
        if producer not in owner:
            continue
        until = again[owner[producer]]
        since = last + 1 if k in saved else born if producer in joined else until
        if since < until:
            delta[since] += graph.storages[k].size_bytes
            delta[until] -= graph.storages[k].size_bytes
    held, level = [], 0
    for change in delta[:-1]:
        level += change
        held.append(level)
    return tuple(held)


def calls_by_worth(graph: CostGraph, blocks: Sequence[Block]) -> list[str]:
    """Kinds of calls in layers, those first whose outputs are dear to make for their size."""
    cost_ns: dict[str, int] = defaultdict(int)
    num_bytes: dict[str, int] = defaultdict(int)
    written_over: set[str] = set()
    for block in blocks:
        for operator in graph.operators[block.begin : block.end]:
            written_over |= _written_over(graph, operator)
            if operator.pinned is None and "+" not in operator.target:
                cost_ns[operator.target] += operator.cost_ns
                num_bytes[operator.target] += sum(
                    graph.storages[k].size_bytes for k in operator.outputs
                )
    return sorted(
        (call for call in cost_ns if _packet(call) not in written_over),
        key=lambda call: (-cost_ns[call] / max(1, num_bytes[call]), call),
    )


def _written_over(graph: CostGraph, operator: Operator) -> set[str]:
    """Return the calls whose outputs an operator writes over in place: they cannot be saved."""
    calls = operator.target.split("+")
    found: set[str] = set()
    for i, call in enumerate(calls):
        if "_." in call:  # such as aten.div_.Scalar
            found |= {_packet(before) for before in calls[:i]}
            if i == 0:
                makers = [graph.storages[k].producer for k in operator.inputs]
                found |= {
                    _packet(before)
                    for v in makers
                    if v is not None
                    for before in graph.operators[v].target.split("+")
                }
    return found


def _is_joined_with(graph: CostGraph, v: int, calls: Sequence[str]) -> bool:
    """Whether an operator stands for several calls, one of these among them."""
    parts = graph.operators[v].target.split("+")
    return len(parts) > 1 and not set(map(_packet, parts)).isdisjoint(map(_packet, calls))


def _packet(call: str) -> str:
    """Name a call without its overload.

    >>> _packet("aten.mul.out")
    'aten.mul'
    """
    return call.rpartition(".")[0]
