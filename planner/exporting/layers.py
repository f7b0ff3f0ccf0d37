"""Settings that checkpoint whole layers: which ones, how many, in groups of how many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from graph_capture.cost_graph import CostGraph
from solvers.schedule import Schedule
from solvers.strategies.attention import megatron_selective
from solvers.strategies.blocks import Block, Blocks, module_blocks
from solvers.strategies.segments import schedule_for_segments
from solvers.strategies.strategy import StrategyError

from ..errors import PlanError
from ..plan_record import PlanRecord
from .choice import Setting


def blocks_of(graph: CostGraph) -> Blocks:
    """Return the layers of a plan's model.

    Raises
    ------
    PlanError
        When it has none.
    """
    try:
        return module_blocks(graph)
    except StrategyError as error:
        raise PlanError(
            f"the plan's model is no stack of layers ({error}), so there is nothing that a "
            "checkpoint by layer could be told: apply the plan itself"
        ) from error


def outermost(blocks: Blocks) -> Blocks:
    """Return the outermost numbered modules: of a T5 its blocks, and not their sublayers."""
    found: list[Block] = []
    for block in blocks.blocks:
        parts = block.name.split(".")
        depth = next(i for i, part in enumerate(parts) if part.isdigit())
        name = ".".join(parts[: depth + 1])
        if found and found[-1].name == name:
            found[-1] = Block(name=name, begin=found[-1].begin, end=block.end)
        else:
            found.append(Block(name=name, begin=block.begin, end=block.end))
    return Blocks(blocks=tuple(found), origin=blocks.origin)


def layer_names(blocks: Blocks) -> tuple[str, ...]:
    """Return the layers' names in forward order; one that is called twice appears once."""
    return tuple(dict.fromkeys(block.name for block in blocks.blocks))


def none(graph: CostGraph) -> Setting:
    """Checkpoint nothing."""
    return Setting(schedule=Schedule.keep_all(graph))


def subsets(plan: PlanRecord, blocks: Blocks) -> Iterator[Iterator[Setting]]:
    """More and more layers, in several orders: from the front, from the back, evenly, as planned.

    In the last order those layers come first in which the plan recomputes most.
    """
    names = layer_names(blocks)
    orders = (
        names,
        names[::-1],
        spread(names),
        _as_planned(plan, blocks),
    )
    for order in dict.fromkeys(orders):
        yield (_checkpointed(plan.graph, blocks, order[:num]) for num in range(len(names) + 1))


def first_layers(graph: CostGraph, blocks: Blocks) -> Iterator[Setting]:
    """The first layers, one by one; run again to their ends, as reentrant checkpoints are."""
    names = layer_names(blocks)
    for num in range(len(names) + 1):
        yield _checkpointed(graph, blocks, names[:num], early_stop=False)


def groups(graph: CostGraph, blocks: Blocks, *, even: bool) -> Iterator[Setting]:
    """All layers, in groups of one, two, …; run again to their ends.

    Parameters
    ----------
    even
        Whether the groups must be of one size.
    """
    names = layer_names(blocks)
    for size in range(1, len(blocks) + 1):
        if not even or len(blocks) % size == 0:
            schedule = schedule_for_segments(graph, blocks.groups(size), early_stop=False)
            yield Setting(schedule=schedule, stack=names, layers=names, group_size=size)


def attention_cores(graph: CostGraph) -> Iterator[Setting]:
    """Only the part between queries, keys, values and context; nothing where it is fused."""
    try:
        yield Setting(schedule=megatron_selective(graph), attention_cores=True)
    except StrategyError:
        return


def _checkpointed(
    graph: CostGraph, blocks: Blocks, names: Sequence[str], *, early_stop: bool = True
) -> Setting:
    chosen = set(names)
    segments = [range(block.begin, block.end) for block in blocks.blocks if block.name in chosen]
    schedule = schedule_for_segments(graph, segments, early_stop=early_stop)
    stack = layer_names(blocks)
    layers = tuple(name for name in stack if name in chosen)
    return Setting(schedule=schedule, stack=stack, layers=layers)


def _as_planned(plan: PlanRecord, blocks: Blocks) -> tuple[str, ...]:
    """Layers by the time of what the plan recomputes in them, most first."""
    again_ns: dict[str, int] = defaultdict(int)
    repeats = plan.schedule.recomputed()
    for block in blocks.blocks:
        for v in range(block.begin, block.end):
            again_ns[block.name] += repeats.get(v, 0) * plan.graph.operators[v].cost_ns
    return tuple(sorted(layer_names(blocks), key=lambda name: -again_ns[name]))


def spread(names: Sequence[str]) -> tuple[str, ...]:
    """Return names in an order of which every beginning is spread evenly."""
    order = sorted(range(len(names)), key=lambda i: _reversed_bits(i, len(names)))
    return tuple(names[i] for i in order)


def _reversed_bits(i: int, count: int) -> int:
    """The order in which halves, quarters, … of a row come."""
    width = max(1, (count - 1).bit_length())
    return int(f"{i:0{width}b}"[::-1], 2)
