"""The distinct blocks of a step, and which modules are alike."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graph_capture.apart.opaque_form import OpaqueForm
from graph_capture.calls.autocast import AutocastState
from graph_capture.calls.call_spec import TensorSpec
from graph_capture.calls.spread_out import mesh_of
from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from graph_capture.reads.snapshots import difference as difference_held


@dataclass(frozen=True, kw_only=True)
class DistinctBlock:
    """A block that was captured, for all that are alike.

    Parameters
    ----------
    path
        The module that was captured.
    module
        The module.
    looks
        See :func:`looks_of`.
    arguments
        Its call by name, tensors as ``TensorSpec``.
    captured
        Its step.
    form
        What the rest of the step sees of it.
    autocast
        What it is called under.
    unused
        Outputs that no gradient comes back for.
    asks
        Whether its own code asks for values of the call, so that another way through it is
        another block.
    """

    path: str
    module: weakref.ref[nn.Module]
    looks: tuple[Any, ...]
    arguments: Mapping[str, Any]
    captured: CapturedStep
    form: OpaqueForm
    autocast: AutocastState
    unused: frozenset[int]
    asks: bool


@dataclass(kw_only=True)
class Known:
    """What several attempts to capture a step have in common.

    Parameters
    ----------
    blocks
        The distinct blocks that were captured.
    ways
        By path and unused outputs, which block a module is that asks for values of its call.
    why_measured
        Why the rest cannot be captured; ``None`` as long as it can. With fewer or smaller
        blocks it cannot either.
    """

    blocks: list[DistinctBlock] = field(default_factory=list)
    ways: dict[tuple[str, frozenset[int]], int] = field(default_factory=dict)
    why_measured: CaptureError | None = None


def looks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return what two blocks must have in common to be alike, apart from what forward reads."""
    parts = tuple((name, type(part), part.training) for name, part in module.named_modules())
    state = tuple(
        (name, TensorSpec.of(tensor), isinstance(tensor, nn.Parameter))
        for named in (
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named
    )
    order: dict[int, int] = {}
    tied = tuple(
        order.setdefault(id(p), len(order))
        for _, p in module.named_parameters(remove_duplicate=False)
    )
    meshes = tuple(mesh_of(p) for p in module.parameters())
    return parts, state, tied, meshes


def reads_the_same(block: DistinctBlock, other: nn.Module) -> bool:
    """Whether another module holds what a captured one's forward has read, at the same places."""
    module = block.module()
    if module is None or module is other:
        return module is other
    path_of = {id(part): name for name, part in module.named_modules()}
    twins = dict(other.named_modules())
    for place in block.captured.step.reads.places:
        holder = place.holder() if isinstance(place.holder, weakref.ref) else place.holder
        if not isinstance(holder, nn.Module) or id(holder) not in path_of:
            continue
        twin = twins[path_of[id(holder)]]
        if difference_held(place.held, place.now_in(twin), place.label) is not None:
            return False
    return True
