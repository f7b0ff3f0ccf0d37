"""Where a planned step's graphs take their inputs from, and where their results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep
from graph_capture.loop.arrival_order import arranged
from graph_capture.loop.consumption import in_turn
from graph_capture.recording.outputs import OutputTemplate
from graph_capture.values.checks import Check

from .backward_segments import Segment, split
from .bindings import Fetch, fetch_of, leave_of, put_back_of
from .rewrite import PlannedGraphs, compile_boxed


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """Where arguments come from and where results go, by position."""

    fetch: tuple[Fetch, ...]  # inputs of the forward graph, from the call's tensors
    saved_at: tuple[int, ...]  # positions of saved inputs among them
    gradient_at: tuple[int | None, ...]  # for each input the index of its gradient
    divisions: tuple[Any, ...]  # for each input how its gradient is divided among ranks
    leaving: tuple[tuple[int, ...], ...]  # inputs whose gradients leave with each segment
    differentiated: tuple[int, ...]
    tangents: tuple[torch.Tensor, ...]  # fake: shapes and strides that backward expects
    template: OutputTemplate
    put_back: tuple[Callable[[list[torch.Tensor]], None], ...]  # what forward replaces
    leave: tuple[Callable[[], None], ...]  # plain values that forward puts into attributes
    require: tuple[int, ...]  # tensors of the call that forward makes require grad
    checks: tuple[Check, ...]
    written_at: tuple[int, ...]  # positions of inputs that are written to before a check

    @classmethod
    def of(
        cls,
        model: nn.Module,
        captured: CapturedStep,
        graphs: PlannedGraphs,
        segments: Sequence[Segment],
    ) -> StepLayout:
        """Bind a step's graphs to a module."""
        step = captured.step
        inputs = list(graphs.forward_inputs)
        inputs += [n for n in graphs.saved_inputs if n not in graphs.forward_inputs]
        inputs += [n for n, _ in step.gradients if n not in inputs]
        position = {node: i for i, node in enumerate(inputs)}
        gradient_of = {node: i for i, (node, _) in enumerate(step.gradients)}
        return cls(
            fetch=tuple(fetch_of(node, model, step.constants) for node in inputs),
            saved_at=tuple(position[n] for n in graphs.saved_inputs),
            gradient_at=tuple(gradient_of.get(n) for n in inputs),
            divisions=tuple(n.meta.get("division") for n in inputs),
            leaving=_leaving([gradient_of.get(n) for n in inputs], segments, captured),
            differentiated=step.differentiated,
            tangents=tuple(n.meta["val"] for n in step.tangents),
            template=step.template,
            put_back=tuple(put_back_of(entry, model) for entry in step.reassigned),
            leave=tuple(leave_of(entry, model) for entry in step.left),
            require=step.made_to_require,
            checks=step.checks,
            written_at=tuple(position[n] for n in step.before_checks.written if n in position),
        )


def segments_of(graphs: PlannedGraphs, captured: CapturedStep) -> tuple[Segment, ...]:
    """Return the parts of the backward graph between which gradients leave."""
    pairs = captured.step.gradients
    # Who waits for gradients gets each as early as it is counted, the others in eager's order.
    hands_on = captured.holds.hands_on or captured.holds.distributed is not None
    return split(
        graphs.backward,
        sizes=[_bytes_of(gradient.meta["val"]) for _, gradient in pairs],
        owners=[storage_id(node.meta["val"]) for node, _ in pairs],
        compiled=compile_boxed,
        cuts=graphs.cuts,
        turns=() if hands_on else _turns(captured),
    )


def _turns(captured: CapturedStep) -> list[int]:
    """For each gradient its turn among all that arrive in eager's backward pass."""
    return [turn for turn, _ in captured.step.arrivals]


def _leaving(
    gradient_at: Sequence[int | None], segments: Sequence[Segment], captured: CapturedStep
) -> tuple[tuple[int, ...], ...]:
    """For each segment the inputs whose gradients leave with it; the first has all others.

    Those of a segment arrive in eager's order, since hooks on parameters may draw random
    numbers, or count. Where gradients are consumed, they arrive in the order that is planned.
    """
    later = {j: s for s, segment in enumerate(segments) if s for j in segment.gradients}
    of_input = [0 if j is None else later.get(j, 0) for j in gradient_at]
    last = max(len(segments), 1) - 1
    if captured.holds.consumes:
        ranks = [_bytes_of(g.meta["val"]) for _, g in captured.step.gradients]
    else:
        ranks = _turns(captured)
    leaving = []
    for s in range(last + 1):
        mine = [i for i, place in enumerate(of_input) if place == s]
        given = [(j, i) for i in mine if (j := gradient_at[i]) is not None]
        others = [i for i in mine if gradient_at[i] is None]
        wanted = in_turn([(ranks[j], j, i) for j, i in given])
        leaving.append((*others, *arranged(wanted, leads_on=s < last)))
    return tuple(leaving)


def has_sums(captured: CapturedStep) -> bool:
    """Whether a parameter is used at several places, whose gradients are added."""
    for leaf, _ in captured.step.gradients:
        users = (user for user in leaf.users if user.meta.get("phase") == "forward")
        if leaf.meta["role"] == "parameter" and len(list(users)) > 1:
            return True
    return False


def reads_what_it_writes(captured: CapturedStep) -> bool:
    """Whether a second forward would start from different buffers than the first."""
    nodes = captured.step.graph.find_nodes(op="placeholder")
    read = {node.meta["target"] for node in nodes if node.meta["role"] == "attribute"}
    if any(e.role == "buffer" or e.target in read for e in captured.step.reassigned):
        return True
    for node in captured.step.graph.nodes:
        for written in node.meta.get("writes", ()):
            if written.op != "placeholder":
                continue
            if written.meta["role"] == "attribute" or set(written.users) - {node}:
                return True
    return False


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
