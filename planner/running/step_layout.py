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
    one_by_one: tuple[tuple[int, tuple[int, ...]], ...]  # the same, a gradient at a time
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
        gradient_at = [gradient_of.get(n) for n in inputs]
        leaving = _leaving(gradient_at, segments, captured)
        return cls(
            fetch=tuple(fetch_of(node, model, step.constants) for node in inputs),
            saved_at=tuple(position[n] for n in graphs.saved_inputs),
            gradient_at=tuple(gradient_at),
            divisions=tuple(n.meta.get("division") for n in inputs),
            leaving=leaving,
            one_by_one=_one_by_one(gradient_at, leaving, captured),
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

    Where gradients are consumed, they are in the order in which they arrive as planned.
    """
    later = {j: s for s, segment in enumerate(segments) if s for j in segment.gradients}
    of_input = [0 if j is None else later.get(j, 0) for j in gradient_at]
    last = max(len(segments), 1) - 1
    leaving = []
    for s in range(last + 1):
        mine = [i for i, place in enumerate(of_input) if place == s]
        if captured.holds.consumes:
            sizes = [_bytes_of(g.meta["val"]) for _, g in captured.step.gradients]
            given = [(sizes[j], j, i) for i in mine if (j := gradient_at[i]) is not None]
            others = [i for i in mine if gradient_at[i] is None]
            mine = [*others, *arranged(in_turn(given), leads_on=s < last)]
        leaving.append(tuple(mine))
    return tuple(leaving)


def _one_by_one(
    gradient_at: Sequence[int | None],
    leaving: Sequence[Sequence[int]],
    captured: CapturedStep,
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """For each gradient its segment and its input, in eager's order within each segment.

    The first has the inputs without a gradient, too. There are none where gradients are
    consumed, whose order is planned.
    """
    if captured.holds.consumes:
        return ()
    turns, found = _turns(captured), []
    for s, inputs in enumerate(leaving):
        given = sorted((turns[j], i) for i in inputs if (j := gradient_at[i]) is not None)
        each: list[tuple[int, ...]] = [(i,) for _, i in given] or [()]
        found += [(s, inputs_of_node) for inputs_of_node in each]
    others = (i for i in leaving[0] if gradient_at[i] is None)
    return ((0, (*others, *found[0][1])), *found[1:])


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
