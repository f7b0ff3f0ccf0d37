"""Split dropout into its mask, one byte per element, and the noise made from it.

Eager dropout on CPU draws ``noise = empty_like(x).bernoulli_(q)`` in the dtype
of ``x``, divides it by ``q`` in place, multiplies, and saves the noise for
backward: four bytes per element in float32. Drawing the same numbers as booleans
and dividing afterwards gives the same bits. It leaves the planner three choices:
save the noise, save the mask, or draw the mask again.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..private_torch.aten import to_copy

aten = torch.ops.aten

_ALLOCATIONS = {aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default}


def split_dropout(graph: Graph) -> int:
    """Rewrite every dropout of ``graph`` in place; returns how many there were."""
    count = 0
    for node in list(graph.nodes):
        if node.target is aten.bernoulli_.float and _split(graph, node):
            count += 1
    return count


def _split(graph: Graph, draw: Node) -> bool:
    noise = draw.args[0]
    if not isinstance(noise, Node) or noise.target not in _ALLOCATIONS:
        return False
    assert callable(noise.target)
    assert callable(draw.target)
    value = noise.meta["val"]
    if draw.kwargs or len(draw.args) > 2 or not value.dtype.is_floating_point:
        return False
    if value.device.type == "cuda" and value.dtype == torch.float64:
        return False  # drawn from numbers of its own (DistributionTemplates.h)
    division = _next_user(noise, after=draw)
    if division is None or division.target is not aten.div_.Scalar or division.users:
        return False
    keep_probability = division.args[1]

    with graph.inserting_before(draw):
        mask = graph.call_function(noise.target, noise.args, {**noise.kwargs, "dtype": torch.bool})
        mask.meta.update({**noise.meta, "val": _like(value, torch.bool)})
        # without a probability it is one half: the dispatcher omits default arguments
        drawn = graph.call_function(draw.target, (mask, *draw.args[1:]))
        drawn.meta.update({**draw.meta, "val": mask.meta["val"], "writes": (mask,)})
    with graph.inserting_before(division):
        scaled = graph.call_function(to_copy.default, (mask,), {"dtype": value.dtype})
        scaled.meta.update({**division.meta, "val": value, "writes": ()})
        divided = graph.call_function(aten.div_.Scalar, (scaled, keep_probability))
        divided.meta.update({**division.meta, "val": value, "writes": (scaled,)})
    graph.erase_node(division)
    graph.erase_node(draw)
    noise.replace_all_uses_with(scaled)
    for user in scaled.users:
        user.meta["writes"] = tuple(scaled if w is noise else w for w in user.meta["writes"])
    graph.erase_node(noise)
    return True


def _next_user(node: Node, *, after: Node) -> Node | None:
    """The first user of ``node`` after ``after`` in graph order; None if any comes before."""
    users = set(node.users)
    current = node.next
    while current.op != "root":
        if current in users and current is not after:
            return current if current > after else None
        current = current.next
    return None


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with tensor.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
