"""What lies around a step's blocks, and where in it their calls are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from graph_capture.apart.opaque_calls import SeenCall
from graph_capture.apart.opaque_form import OpaqueForm
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from graph_capture.loop.loss import LossSpec
from solvers.block_plans.stepping import BlockCall

from .inside_block import InsideBlock
from .unfit_blocks import UnfitBlockError


@dataclass(frozen=True, kw_only=True)
class CallPlace:
    """Where in the rest a block's call is.

    Parameters
    ----------
    forward, backward
        The operators that stand for the two.
    given, tangents
        The storage of each tensor of the call, and of each gradient of what it returns.
    made, gradients
        The storage of each tensor that forward makes, and that backward makes, by index;
        those that nobody reads may be missing.
    copied_bytes
        Of those gradients of outputs that come in another layout than the block's backward was
        captured with, and are copied.
    """

    forward: int
    backward: int
    given: tuple[int, ...]
    tangents: tuple[int, ...]
    made: Mapping[int, int]
    gradients: Mapping[int, int]
    copied_bytes: int = 0


class Rest(Protocol):
    """The rest of a step."""

    captured: CapturedStep
    """What a plan's record says of the step."""

    loss: LossSpec
    """Where backward begins."""

    state: Mapping[str, int]
    """The storage of each parameter and buffer, by each of its names."""

    measured: bool
    """Whether it was run for real."""

    def graph(self, copied_bytes: int | None) -> CostGraph:
        """Return its operators, in which those that stand for blocks take no time or scratch.

        Parameters
        ----------
        copied_bytes
            Of what blocks copy in case that a check of a value fails; ``None`` for the step
            without a plan.
        """

    def place_of(self, call: SeenCall) -> CallPlace | None:
        """Return where a call is; ``None`` where the model writes to what it returns."""


def block_call(
    rest: Rest, call: SeenCall, block: int, inside: InsideBlock, *, holds: bool
) -> BlockCall:
    """Say where in the rest a block's call is, and which storages they share.

    Parameters
    ----------
    block
        Index of the distinct block.
    holds
        Whether the call holds its arguments until its backward, as a planned one does.
    """
    place = rest.place_of(call)
    if place is None:
        raise UnfitBlockError(
            call.path,
            f"the model writes in place to what block {call.path!r} returns, which a plan "
            "inside the block cannot follow: write to a copy, or leave it out of blocks=",
        )
    outside = {k: place.given[i] for i, k in inside.inputs.items()}
    made = iter(range(len(call.form.outputs)))
    for i, output in enumerate(call.form.outputs):
        if output.given is None:
            item = place.made.get(next(made))
            if item is not None:
                outside[inside.of_output[i]] = item
    outside.update(zip(inside.tangents, place.tangents, strict=True))
    made = iter(range(len(call.form.gradients)))
    for k, gradient in zip(inside.gradients, call.form.gradients, strict=True):
        if gradient.given is None:
            item = place.gradients.get(next(made))
            if item is not None:
                outside[k] = item
    for name, k in inside.state.items():
        outside[k] = rest.state[f"{call.path}.{name}"]
    return BlockCall(
        path=call.path,
        block=block,
        forward=place.forward,
        backward=place.backward,
        outside=outside,
        arguments=tuple(sorted(set(place.given))) if holds else (),
        held_bytes=_handed_over_bytes(call.form) + place.copied_bytes if holds else 0,
    )


def _handed_over_bytes(form: OpaqueForm) -> int:
    """Bytes of the elements that stand for gradients which a planned call takes over."""
    return sum(form.outputs[i].spec.dtype.itemsize for i in form.differentiated)
