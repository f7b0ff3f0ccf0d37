"""Selective policies: which calls' outputs are saved, by the kind of call.

*Matrix products saved*: outputs of matrix products, convolutions and fused
attention are saved, everything else is recomputed. It is the usual policy for
``torch.utils.checkpoint.create_selective_checkpoint_contexts`` and for
``torch.compile``, and Chen et al. (arXiv:1604.06174, Section 4.2) proposed it as
"drop the results of low cost operations". Two ways to run it:

- over the whole graph, lazily (``saved.py``), as a partitioned joint graph runs;
- per block (``segments.py``): the input of a block is saved, too, and a block is
  recomputed in one go with the saved outputs taken from a cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from graph_capture.cost_graph import CostGraph, Operator

from ..schedule import Schedule
from ..uniform import turning_point
from .blocks import module_blocks
from .saved import schedule_for_saved
from .segments import schedule_for_segments
from .strategy import Candidate, Strategy, StrategyError, StrategyOptions

MATRIX_PRODUCTS = frozenset(
    {
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "mv",
        "addmv",
        "matmul",
        "linear",
        "einsum",
        "convolution",
        "_convolution",
        "conv1d",
        "conv2d",
        "conv3d",
        "mkldnn_convolution",
        "cudnn_convolution",
        "_scaled_mm",
        "_grouped_mm",
    }
)
FUSED_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
"""How the names of fused attention calls begin."""
_NUMBER = re.compile(r"_\d+$")
_LAYER = re.compile(r"(^|_)conv\d*(d|d_transpose)?$")
"""Names of convolutional layers in instances of other papers: ``block1_conv1``, ``conv2d``."""


def calls_of(op: Operator) -> list[str]:
    """Return the names of an operator's calls without namespace, overload and number.

    Examples
    --------
    >>> calls_of(Operator(name="a", target="aten.addmm.default+mul_.Scalar"))
    ['addmm', 'mul_']
    >>> calls_of(Operator(name="b", target="addmm_17"))  # an instance of another paper
    ['addmm']
    """
    names = []
    for target in op.target.split("+"):
        parts = target.replace("::", ".").split(".")
        # "aten.mm.default", and "mul.out" where calls of one operator are joined
        names.append(parts[-2] if len(parts) > 1 else _NUMBER.sub("", parts[0]))
    return names


def is_matrix_product(op: Operator) -> bool:
    """Whether one of its calls multiplies matrices, convolves or attends."""
    return any(
        name in MATRIX_PRODUCTS or name.startswith(FUSED_ATTENTION) or _LAYER.search(name)
        for name in calls_of(op)
    )


def matrix_products(graph: CostGraph) -> list[int]:
    """Return the forward operators that are matrix products, convolutions or fused attention.

    Raises
    ------
    StrategyError
        When there are none.
    """
    found = [v for v in range(turning_point(graph)) if is_matrix_product(graph.operators[v])]
    if not found:
        raise StrategyError(
            "no matrix products: no forward operator's target names one (aten.mm, convolution, …)"
        )
    return found


def save_only_matmuls(graph: CostGraph) -> Schedule:
    """Save matrix products, and recompute everything else lazily."""
    return schedule_for_saved(graph, operators=matrix_products(graph))


def save_matmuls_per_block(graph: CostGraph) -> Schedule:
    """Save blocks' inputs and matrix products, and recompute each block in one go."""
    saved = {k for v in matrix_products(graph) for k in graph.operators[v].outputs}
    return schedule_for_segments(graph, module_blocks(graph).groups(1), saved=saved)


def _propose_whole(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    yield Candidate(schedule=save_only_matmuls(graph))


def _propose_per_block(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    yield Candidate(schedule=save_matmuls_per_block(graph))


SAVE_ONLY_MATMULS = Strategy(
    name="save_only_matmuls",
    summary="outputs of matrix products, convolutions, fused attention saved; the rest lazily",
    source="the usual selective checkpointing policy; Chen et al., arXiv:1604.06174, Section 4.2",
    propose=_propose_whole,
)
SAVE_MATMULS_PER_BLOCK = Strategy(
    name="save_matmuls_per_block",
    summary="inputs of blocks and matrix products saved; each block recomputed in one go",
    source="torch.utils.checkpoint with create_selective_checkpoint_contexts, per block",
    propose=_propose_per_block,
)
