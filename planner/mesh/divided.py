"""Divide a stage's matrices, and check that its code works on parts as it does on the whole.

Code that insists on undivided sizes may still run: ``view(batch, -1, heads, width)`` of half of
the features takes two tokens for one. So the step is captured with whole and with divided
matrices, and compared product by product (matrices, attention, convolutions): each has the same
arithmetic and result as before, or one rank's part of both. Other calls may differ: heads that
are not repeated need no copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from graph_capture.costs.flops import count_flops
from graph_capture.errors import CaptureError
from graph_capture.private_torch.operators import OpOverload

from ..base.step_spec import StepSpec
from ..planning.captured_call import captured_call
from .tensor_parallel import Collectives, divide


def divide_and_check(
    module: nn.Module,
    sample: Mapping[str, Any],
    parts: Mapping[str, str],
    ranks: int,
    step: Mapping[str, Any],
) -> Collectives:
    """Give a module one rank's shapes; return what the ranks sum and gather.

    Parameters
    ----------
    step
        Options of its :class:`~planner.base.step_spec.StepSpec`.

    Raises
    ------
    ValueError
        When it cannot be divided so, or works on its parts otherwise than on the whole.
    CaptureError
        When it cannot be captured.
    """
    collectives = Collectives()
    spec = StepSpec(model=module, sample_input=dict(sample), **{**step, "optimizer": None})
    with captured_call(spec) as call:
        whole = _work(call.captured.step.graph)
    divide(module, parts, ranks)
    with explained(parts, ranks), collectives.watching(module, parts), captured_call(spec) as call:
        part = _work(call.captured.step.graph)
    names = [name for name, _, _ in whole]
    if names != [name for name, _, _ in part]:
        raise ValueError(
            f"with one of {ranks} parts of its matrices the {type(module).__name__} makes other "
            f"products than with whole ones: it cannot be estimated so, {_INSTEAD}"
        )
    for (name, work, where), (_, own, _) in zip(whole, part, strict=True):
        wrong = [a for a, b in zip(work, own, strict=True) if a not in (b, ranks * b)]
        if wrong:
            raise ValueError(
                f"with one of {ranks} parts of its matrices the {type(module).__name__} does "
                f"neither all nor one part of the work of {name!r} ({where}): its code computes "
                f"with undivided sizes, and cannot be estimated so; {_INSTEAD}"
            )
    return collectives


_INSTEAD = "leave the modules around this out of tp_plan="


@contextmanager
def explained(parts: Mapping[str, str], ranks: int) -> Iterator[None]:
    """Say that matrices are divided where a step cannot be captured."""
    try:
        yield
    except CaptureError as error:
        if parts:
            error.add_note(
                f"{len(parts)} modules have the shapes of one of {ranks} tensor-parallel ranks: a "
                "model that computes with its undivided sizes cannot be estimated so"
            )
        raise


def _work(graph: Graph) -> list[tuple[str, tuple[int, ...], str]]:
    """Each product's name, its arithmetic and the numbers it makes, and its line."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        value = node.meta.get("val")
        made = value if isinstance(value, (tuple, list)) else (value,)
        numbers = [tensor.numel() for tensor in made if isinstance(tensor, Tensor)]
        args, kwargs = (map_arg(part, _value) for part in (node.args, node.kwargs))
        flops = count_flops(node.target, args, kwargs, value)
        if flops:
            found.append((str(node.target), (flops, *numbers), str(node.meta.get("source", ""))))
    return found


def _value(node: Node) -> Any:
    return node.meta.get("val")
