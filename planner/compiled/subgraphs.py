"""Memory that calls with graphs inside take while they run.

``cond``, ``scan``, ``map`` and the like run graphs of their own, whose memory is in no node of the
joint graph. With eager kernels each such call is run once, on zeros, while the allocator's reports
are recorded; a ``cond`` once for each of its branches. A ``while_loop`` may not end on zeros, so it
is not run. Code that Inductor generates is read as a whole, for each branch, but without rounds of
loops.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.costs.trial import REFUSALS
from graph_capture.private_torch.operators import OpOverload
from graph_capture.private_torch.trees import tree_map

from ..errors import PlanWarning
from .generated import zeros
from .joint_step import tensors_of

NOT_COUNTED = (
    "what {name!r} ({target}) takes while it runs, beside its results, is not counted{why}; the "
    "step may be that much above its budget: measure it, and say it by resident_bytes="
)


def inside_bytes(module: GraphModule, call: Node) -> int:
    """Return the most that a call holds while it runs, beyond its arguments and results.

    Parameters
    ----------
    module
        The joint graph, which has the graphs inside.
    """
    if isinstance(call.target, OpOverload) or not _graphs_inside(module, call):
        return 0
    if "while" in str(call.target):
        return _not_counted(call, ", as it may not end on made-up values")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return max(_peak_bytes(call, args) for args in _arguments(module, call))
    except REFUSALS as error:
        return _not_counted(call, f": {error!s:.200}")


def has_branches(*modules: GraphModule) -> bool:
    """Whether a graph, or one inside of it, has a ``cond``: one of its branches runs."""
    return "cond" in _inner_calls(modules)


def warn_of_loops(module: GraphModule, calls: Iterable[Node]) -> None:
    """Say which calls hold a loop, whose rounds are not run when generated code is read."""
    for call in calls:
        inside = _graphs_inside(module, call)
        names = _inner_calls([_attribute(module, n) for n in inside]) | {str(call.target)}
        if inside and any("scan" in name or "while" in name for name in names):
            _not_counted(call, ", as generated loops are not run when the code is read")


def _inner_calls(modules: Iterable[torch.nn.Module]) -> set[str]:
    graphs = (m.graph for module in modules for m in module.modules() if isinstance(m, GraphModule))
    return {
        str(n.target)
        for graph in graphs
        for n in graph.nodes
        if n.op == "call_function" and not isinstance(n.target, OpOverload)
    }


def _not_counted(call: Node, why: str) -> int:
    said = NOT_COUNTED.format(name=call.name, target=call.target, why=why)
    warnings.warn(said, PlanWarning, stacklevel=2)
    return 0


def _graphs_inside(module: GraphModule, call: Node) -> list[Node]:
    read = (n for n in call.all_input_nodes if n.op == "get_attr")
    return [n for n in read if isinstance(_attribute(module, n), torch.nn.Module)]


def _arguments(module: GraphModule, call: Node) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    def value(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        if argument.op == "get_attr" and "val" not in argument.meta:
            return _attribute(module, argument)
        return tree_map(zeros, argument.meta["val"])

    args, kwargs = tree_map(value, (call.args, dict(call.kwargs)))
    yield args, kwargs
    predicate = args[0] if args else None
    if isinstance(predicate, torch.Tensor) and predicate.dtype == torch.bool:
        yield (torch.ones_like(predicate), *args[1:]), kwargs


def _peak_bytes(call: Node, given: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    args, kwargs = given
    target: Any = call.target
    results: list[Any] = []
    peak_bytes = peak_extra_bytes(lambda: results.append(target(*args, **kwargs)))
    there = {t.untyped_storage().data_ptr() for t in tensors_of(given)}
    made = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(results)}
    handed_out = sum(memory.nbytes() for place, memory in made.items() if place not in there)
    return max(0, peak_bytes - handed_out)


def _attribute(module: GraphModule, node: Node) -> Any:
    found: Any = module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


__all__ = ["NOT_COUNTED", "has_branches", "inside_bytes", "warn_of_loops"]
