"""Code that Inductor generated once is not generated again.

A plan's graphs are lowered to read what their code takes, and lowered again when the plan that
was chosen is compiled. Most of that is fusing and writing kernels, which comes to the same code.

Imported when it is asked for, which takes seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .compiler import inductor_settings
from .inductor_fusion import told
from .replacing import Place
from .trees import tree_leaves

MOST_KEPT = 8
"""Of the graphs that were lowered last: a plan has two."""


@dataclass(frozen=True, slots=True)
class _Code:
    """What ``GraphLowering.codegen`` returned, and left in the lowering."""

    result: Any
    partition_maps: Any


@contextmanager
def generating_once() -> Iterator[None]:
    """``GraphLowering.codegen``: what is as before gets the code from before; 2.11+.

    Graphs of symbolic sizes and with collectives are always lowered: their code leaves guards and
    logs. So are those that read attributes: branches of a ``cond``, whose code is part of theirs,
    and constants, whose numbers may be.
    """
    from torch._inductor import graph

    codegen = graph.GraphLowering.codegen
    kept: dict[str, _Code] = {}

    def once(lowering: Any) -> Any:
        # A branch's lowering writes into the code of the graph around it.
        name = _name_of(lowering) if type(lowering) is graph.GraphLowering else ""
        code = kept.pop(name, None)
        if code is None:
            result = codegen(lowering)
            if name:
                code = _Code(_without_nodes(result), lowering.partition_maps)
        else:
            lowering.scheduler = SimpleNamespace(nodes=[])  # asked for collectives alone
            lowering.partition_maps = code.partition_maps
            result = code.result
        if code is not None:
            kept[name] = code
            while len(kept) > MOST_KEPT:
                kept.pop(next(iter(kept)))
        return result

    with Place(graph.GraphLowering, "codegen").holding(once):
        yield


def _name_of(lowering: Any) -> str:
    """A name of all that the code depends on; empty where it may do more than be there."""
    digest = hashlib.sha256()
    visible = lowering.user_visible_output_strides
    told_of = (
        inductor_settings(),
        lowering.is_backward,
        lowering.is_inference,
        lowering.cpp_wrapper,
        lowering.bw_donated_idxs if lowering.is_backward else None,  # else it is not looked at
        sorted((str(n), strides) for n, strides in visible.items() if n is not None),
        [(name, str(box.get_layout())) for name, box in _tensors(lowering.graph_inputs)],
        [(name, tuple(t.shape), t.dtype) for name, t in lowering.constants.items()],
    )
    digest.update(repr(told_of).encode())
    for node in lowering.module.graph.nodes:
        if node.op == "get_attr" or "c10d" in str(node.target):
            return ""
        shown = [str(node.target), *map(str, (node.op, node.name, node.args, node.kwargs))]
        for leaf in tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
                return ""
            if isinstance(leaf, torch.Tensor):
                if any(isinstance(n, torch.SymInt) for n in (*leaf.shape, *leaf.stride())):
                    return ""
                shown.append(f"{leaf.dtype} {leaf.device} {leaf.shape} {leaf.stride()}")
        digest.update(repr((shown, told(node))).encode())
    return digest.hexdigest()


def _tensors(inputs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, box) for name, box in inputs.items() if hasattr(box, "get_layout")]


def _without_nodes(result: Any) -> Any:
    """The code with the stack traces of its lines, but not with the nodes that have them."""

    def light(code: Any) -> Any:
        lines = getattr(code, "line_map", None)
        if lines is None:
            return code
        traces = [(n, SimpleNamespace(stack_trace=node.stack_trace)) for n, node in lines]
        return type(code)(code.value, traces)

    return tuple(map(light, result))


__all__ = ["generating_once"]
