"""Strategies that divide the model's blocks into segments of equal numbers.

All of them save what enters a segment and recompute the segment in one go
(``segments.py``). They differ in how many blocks a segment has, whether the last
segment is recomputed, too, and where a recomputation ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule
from .blocks import find_blocks, module_blocks
from .segments import schedule_for_segments
from .strategy import Candidate, Strategy, StrategyError, StrategyOptions


def uniform_every(graph: CostGraph, size: int) -> Schedule:
    """Segments of ``size`` blocks; the last one is kept, because its backward pass comes at once.

    As in ``torch.utils.checkpoint.checkpoint_sequential``, every segment but the
    last is recomputed. That function is told a number of segments, though, and adds
    blocks left over to the last one (:func:`uniform_segments`); here they are a
    last segment of their own: of ten blocks by three, one is kept, not four.
    """
    segments = find_blocks(graph).groups(size)
    return schedule_for_segments(graph, segments[:-1])


def uniform_sqrt(graph: CostGraph) -> Schedule:
    """About sqrt(L) segments of the L blocks, of equal numbers of blocks; the last is kept.

    Chen et al., *Training Deep Nets with Sublinear Memory Cost*
    (arXiv:1604.06174), Section 4.3: sqrt(L) segments need O(sqrt(L)) memory for
    one more forward pass. The last of ``round(sqrt(L))`` segments takes what is
    left over, as in ``checkpoint_sequential``.
    """
    return uniform_segments(graph, num_segments=max(1, round(math.sqrt(len(find_blocks(graph))))))


def uniform_segments(graph: CostGraph, num_segments: int) -> Schedule:
    """Cut ``num_segments`` segments as ``checkpoint_sequential`` does; the last is kept."""
    blocks = find_blocks(graph)
    if not 1 <= num_segments <= len(blocks):
        raise StrategyError(f"{num_segments} segments of {len(blocks)} blocks")
    size = len(blocks) // num_segments
    return schedule_for_segments(graph, blocks.groups(size)[: num_segments - 1])


def per_layer(graph: CostGraph, *, early_stop: bool = True) -> Schedule:
    """Make every block a segment of its own, including the last one.

    What ``model.gradient_checkpointing_enable()`` of Transformers does: each
    layer's input is saved and the layer runs again before its backward pass.
    Version 5 uses checkpointing without reentrance, with early stop.
    """
    return schedule_for_segments(graph, module_blocks(graph).groups(1), early_stop=early_stop)


def every_n_layers(graph: CostGraph, n: int) -> Schedule:
    """Make every ``n``-th block a segment, beginning with the first; keep the others.

    What ``model.activation_checkpointing_enable(every_n_layers=n)`` of Transformers does.
    """
    segments = module_blocks(graph).groups(1)
    if not 1 <= n <= len(segments):
        raise StrategyError(f"every {n}th layer of {len(segments)}")
    return schedule_for_segments(graph, segments[::n])


def megatron_uniform(graph: CostGraph, size: int) -> Schedule:
    """Groups of ``size`` layers, all recomputed to their ends.

    Megatron-LM's full recomputation, method *uniform*: the layers are divided
    into groups of ``recompute_num_layers``, and of each its input is saved.
    """
    return schedule_for_segments(graph, module_blocks(graph).groups(size), early_stop=False)


def megatron_block(graph: CostGraph, num_layers: int) -> Schedule:
    """The first ``num_layers`` layers are recomputed one by one, the others kept.

    Megatron-LM's full recomputation, method *block*.
    """
    segments = module_blocks(graph).groups(1)
    if not 0 <= num_layers <= len(segments):
        raise StrategyError(f"{num_layers} layers of {len(segments)}")
    return schedule_for_segments(graph, segments[:num_layers], early_stop=False)


def _propose_sqrt(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    num_segments = max(1, round(math.sqrt(len(find_blocks(graph)))))
    yield Candidate(schedule=uniform_sqrt(graph), setting=f"segments={num_segments}")


def _propose_every(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    for size in _sizes(len(find_blocks(graph))):
        yield Candidate(schedule=uniform_every(graph, size), setting=f"k={size}")


def _propose_per_layer(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    yield Candidate(schedule=per_layer(graph))


def _propose_every_n_layers(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    for n in _sizes(len(module_blocks(graph))):
        yield Candidate(schedule=every_n_layers(graph, n), setting=f"n={n}")


def _propose_megatron_uniform(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    for size in _sizes(len(module_blocks(graph))):
        yield Candidate(schedule=megatron_uniform(graph, size), setting=f"k={size}")


def _propose_megatron_block(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    num_blocks = len(module_blocks(graph))
    for num_layers in (num_blocks, *range(num_blocks)):
        yield Candidate(schedule=megatron_block(graph, num_layers), setting=f"n={num_layers}")


def _sizes(num_blocks: int) -> list[int]:
    """Sizes that cut differently: 1, 2, 3, … and, where there are many, some 10 % apart."""
    sizes = [1]
    while sizes[-1] < num_blocks:
        sizes.append(min(num_blocks, max(sizes[-1] + 1, round(1.1 * sizes[-1]))))
    return sizes


CHEN = "Chen et al., arXiv:1604.06174"
MEGATRON = "Korthikanti et al., arXiv:2205.05198"

UNIFORM_SQRT = Strategy(
    name="uniform_sqrt",
    summary="inputs of sqrt(L) segments of blocks saved; all segments but the last recomputed",
    source=f"{CHEN}, Section 4.3; torch.utils.checkpoint.checkpoint_sequential",
    propose=_propose_sqrt,
)
UNIFORM_EVERY_K = Strategy(
    name="uniform_every_k",
    summary="the input of every k-th block saved; all segments but the last recomputed",
    source="torch.utils.checkpoint.checkpoint_sequential",
    propose=_propose_every,
)
TRANSFORMERS_PER_LAYER = Strategy(
    name="transformers_per_layer",
    summary="each block's input saved; every block recomputed",
    source="Transformers 5, gradient_checkpointing_enable()",
    propose=_propose_per_layer,
)
TRANSFORMERS_EVERY_N = Strategy(
    name="transformers_every_n_layers",
    summary="the input of every n-th layer saved, those layers recomputed; the others kept",
    source="Transformers 5, activation_checkpointing_enable(every_n_layers=n)",
    propose=_propose_every_n_layers,
)
MEGATRON_FULL_UNIFORM = Strategy(
    name="megatron_full_uniform",
    summary="inputs of groups of k layers saved; every group recomputed to its end",
    source=f"{MEGATRON}, Section 5; Megatron-LM --recompute-method uniform",
    propose=_propose_megatron_uniform,
)
MEGATRON_FULL_BLOCK = Strategy(
    name="megatron_full_block",
    summary="inputs of the first n layers saved, those layers recomputed; the others kept",
    source=f"{MEGATRON}, Section 5; Megatron-LM --recompute-method block",
    propose=_propose_megatron_block,
)
