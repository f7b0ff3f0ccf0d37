"""The peak of what Inductor makes of a forward and a backward graph.

Inductor fuses, reorders and reuses buffers, so the peak of its code is not that of the graphs.
The code that it generates says which memory is taken and freed, line by line. Here it is run
with kernels that do nothing, on zeros, while the allocator's reports are recorded. Library
kernels (products, convolutions, attention) do run, so that their results and scratch count. No
kernel is compiled for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graph_capture.calls.storage_id import storage_id
from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.private_torch.compiler import frees_tangents, functorch_config
from graph_capture.private_torch.dispatch import disable_current_modes
from graph_capture.private_torch.fake_tensors import FakeTensorMode
from graph_capture.private_torch.inductor import GeneratedCode, generate_code

from .generated import runnable, zeros
from .joint_step import is_number, is_tangent, tensors_of
from .sizes import concrete, num_bytes
from .subgraphs import has_branches


def lowered_extra_bytes(
    forward: GraphModule,
    backward: GraphModule,
    num_outputs: int,
    *,
    releases_outputs: bool = False,
) -> int:
    """Return the peak of the two graphs compiled by Inductor, beyond forward's inputs.

    Parameters
    ----------
    forward, backward
        As a partition function returns them; they are not changed.
    num_outputs
        How many of forward's results are not for backward.
    releases_outputs
        As of :func:`~planner.compiled.priced_step.price_step`.

    Notes
    -----
    Where a ``cond`` chooses between branches, the code is read twice, as truth values decide.
    """
    truths = (False, True) if has_branches(forward, backward) else (False,)
    return max(
        _extra_bytes(forward, backward, num_outputs, truth=truth, releases_outputs=releases_outputs)
        for truth in truths
    )


def handed_over_bytes(forward: GraphModule) -> int:
    """What a forward graph's results hold beside its inputs; its step takes no less beyond these.

    Parameters
    ----------
    forward
        As a partition function returns it.
    """
    given = {storage_id(t) for n in _inputs(forward) for t in tensors_of(n.meta.get("val"))}
    made = [t for n in _results(forward) if isinstance(n, Node) for t in tensors_of(n.meta["val"])]
    sizes = {storage_id(t): num_bytes(t) for t in made}
    return sum(size_bytes for memory, size_bytes in sizes.items() if memory not in given)


def _extra_bytes(
    forward: GraphModule,
    backward: GraphModule,
    num_outputs: int,
    *,
    truth: bool,
    releases_outputs: bool,
) -> int:
    code = _code(forward, _values(forward), num_outputs, is_backward=False)
    run_forward = runnable(code, truth=truth)
    with disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        inputs = [zeros(value, truth=truth) for value in _values(forward)]
        saved = list(run_forward(list(inputs))[num_outputs:])
        given = _backward_values(backward, saved)
    donated = _donated(forward, backward, num_outputs)
    code = _code(backward, given, len(_results(backward)), is_backward=True, donated=donated)
    run_backward = runnable(code, truth=truth)
    tangents = [n.meta["val"] for n in _inputs(backward) if is_tangent(n)]

    def step() -> Any:
        results = list(run_forward(list(inputs)))
        outputs, kept = results[:num_outputs], results[num_outputs:]
        results.clear()
        numbers = [x for x in kept if not isinstance(x, torch.Tensor)]
        boxed = [*numbers, *(x for x in kept if isinstance(x, torch.Tensor))]
        kept.clear()
        held = [zeros(t) for t in tangents]
        boxed += held
        if releases_outputs:
            outputs = [t for t in outputs if isinstance(t, torch.Tensor) and t.numel() <= 1]
        if frees_tangents() and any(t.numel() <= 1 for t in held):
            held = [t for t in held if t.numel() <= 1]  # the loss's, which the engine holds
        gradients = run_backward(boxed)
        return outputs, gradients, held

    with disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        del saved
        return peak_extra_bytes(step)


def _code(
    module: GraphModule,
    inputs: Sequence[Any],
    num_visible: int,
    *,
    is_backward: bool,
    donated: Sequence[int] = (),
) -> GeneratedCode:
    return generate_code(
        copied(module), inputs, is_backward=is_backward, num_visible=num_visible, donated=donated
    )


def _donated(forward: GraphModule, backward: GraphModule, num_outputs: int) -> list[int]:
    """Inputs of backward that nobody else has, whose memory its code may reuse."""
    if not functorch_config().donated_buffer:
        return []
    results = _results(forward)
    others = [*_inputs(forward), *results[:num_outputs], *_results(backward)]
    held = {storage_id(t) for n in others if isinstance(n, Node) for t in tensors_of(n.meta["val"])}
    return [
        i
        for i, node in enumerate(_inputs(backward))
        if not is_tangent(node) and not is_number(node)
        if held.isdisjoint(storage_id(t) for t in tensors_of(node.meta["val"]))
    ]


def copied(module: GraphModule) -> GraphModule:
    """A copy of a graph module whose nodes have the same stand-ins."""
    graph = Graph()
    results = graph.graph_copy(module.graph, {})
    output = graph.output(results)
    (original,) = module.graph.find_nodes(op="output")
    output.meta = dict(original.meta)
    return GraphModule(module, graph)


def _inputs(module: GraphModule) -> list[Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _values(module: GraphModule) -> list[Any]:
    return [node.meta["val"] for node in _inputs(module)]


def _results(module: GraphModule) -> Sequence[Any]:
    (output,) = module.graph.find_nodes(op="output")
    results: Sequence[Any] = output.args[0]
    return results


def _backward_values(backward: GraphModule, saved: Sequence[Any]) -> list[Any]:
    """Backward's stand-ins, with the strides that forward's code really gives."""
    numbers = [x for x in saved if not isinstance(x, torch.Tensor)]
    real = iter([*numbers, *(x for x in saved if isinstance(x, torch.Tensor))])
    values = []
    for node in _inputs(backward):
        value = node.meta["val"]
        if not is_tangent(node):
            made = next(real)
            if isinstance(made, torch.Tensor) and isinstance(value, torch.Tensor):
                mode: FakeTensorMode = value.fake_mode  # type: ignore[attr-defined]
                if tuple(concrete(value).stride()) != made.stride():
                    with mode:
                        value = torch.empty_strided(
                            value.shape, made.stride(), dtype=value.dtype, device=value.device
                        )
        values.append(value)
    return values


__all__ = ["copied", "handed_over_bytes", "lowered_extra_bytes"]
