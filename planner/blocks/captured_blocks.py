"""Capture a step's blocks by their real calls, and the rest of the step around them.

The rest is captured with the blocks as operators of their own kind
(``graph_capture/apart/opaque_calls.py``). At the first call of a block that is not known yet the
capture ends, this block is captured by that call, and the capture begins again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from graph_capture.apart.call_values import CallValues, takes_same_way
from graph_capture.apart.opaque_calls import (
    CheckpointedCallError,
    OpaqueCalls,
    SeenCall,
    UnknownFormError,
)
from graph_capture.apart.opaque_form import OpaqueForm
from graph_capture.calls.autocast import AutocastState
from graph_capture.calls.call_spec import difference, to_json
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.costs.target import Target
from graph_capture.errors import CaptureError, UnknownValueError
from graph_capture.loop.loss import LossRegion, LossSource, LossSpec
from graph_capture.loop.optimizer_step import measure_optimizer
from graph_capture.step_capture import capture_step

from ..base.forward_slot import original_forward
from ..base.step_spec import StepSpec
from ..errors import PlanError
from .distinct_blocks import DistinctBlock, Known, looks_of, reads_the_same
from .unfit_blocks import UnfitBlockError, refuse_divided_call, refuse_unfit

R = TypeVar("R")


class ValuesNeededError(Exception):
    """A block's code asks for values of its call, which is made on stand-ins.

    Parameters
    ----------
    path
        The block.
    why
        How its capture ended.
    """

    def __init__(self, path: str, why: CaptureError) -> None:
        super().__init__(path)
        self.path, self.why = path, why


MAX_ROUNDS = 200
"""Distinct calls of blocks in a step; a model with more has no blocks that are alike."""


class Capturing:
    """Captures the rest again and again, with one more block known each time."""

    def __init__(
        self,
        model: nn.Module,
        paths: tuple[str, ...],
        spec: StepSpec,
        target: Target,
        progress: TimingProgress | None,
        known: Known,
    ) -> None:
        self.model, self.spec, self.target, self.progress = model, spec, target, progress
        self.modules = {path: model.get_submodule(path) for path in paths}
        self.blocks, self.ways = known.blocks, known.ways
        self.used: dict[str, int] = {}  # path -> distinct block
        self.met: dict[int, None] = {}  # distinct blocks, in the order in which they were met
        self.unused: dict[str, frozenset[int]] = {}
        self._looks = {path: looks_of(module) for path, module in self.modules.items()}

    def rest(self, arguments: Mapping[str, Any]) -> tuple[CapturedStep, list[SeenCall]]:
        """Return the rest, captured on stand-ins, and the blocks' calls in it."""
        optimizer, holds = self.spec.optimizer, self.spec.holds
        if holds.sharded is None:
            updated = measure_optimizer(optimizer, self.model, self.target)
        else:
            shard_of = holds.sharded.shard_of
            updated = measure_optimizer(optimizer, self.model, self.target, part_of=shard_of)
            holds = replace(holds, sharded=None, grads="none")  # which comes later

        def captured(calls: OpaqueCalls, forward: Callable[..., Any]) -> CapturedStep:
            return capture_step(
                self.model,
                arguments,
                loss=self.spec.loss_fn,
                optimizer=updated,
                forward=calls.around(forward),
                target=self.target,
                cost_model=self.spec.cost_model,
                progress=self.progress,
                holds=holds,
            )

        return self.rounds(captured)

    def rounds(
        self, run: Callable[[OpaqueCalls, Callable[..., Any]], R]
    ) -> tuple[R, list[SeenCall]]:
        """Run the rest until each block that it calls is known.

        Parameters
        ----------
        run
            Gets the blocks' calls and the model's own forward.
        """
        forward = original_forward(self.model)
        for _ in range(MAX_ROUNDS):
            calls = OpaqueCalls(self.modules, self._form_of, self.target.torch_type)
            unknown: UnknownFormError | None = None
            try:
                rest = run(calls, forward)
            except UnknownFormError as error:
                unknown = error.with_traceback(None)  # which holds what was computed so far
            except CheckpointedCallError as checkpointed:
                raise PlanError(
                    f"block {checkpointed.path!r} is called by torch.utils.checkpoint, which would "
                    "run it again beside its plan, and the plan decides what is repeated: switch "
                    "gradient checkpointing off (model.gradient_checkpointing_disable() in "
                    "Transformers), or leave the block out of blocks="
                ) from checkpointed
            finally:
                calls.forget()
            if unknown is not None:
                with unknown.autocast.holding():
                    self._capture(unknown)
                continue
            seen = list(calls.seen)
            missing = self._note_unused(seen, calls.without_gradient)
            if not missing:
                under = {path: self.blocks[b].autocast for path, b in self.used.items()}
                refuse_unfit(self.model, self.modules, seen, calls.out_of_order, under)
                return rest, seen
        raise PlanError(
            f"more than {MAX_ROUNDS} blocks differ from one another: name fewer in blocks="
        )

    def _form_of(
        self,
        path: str,
        arguments: Mapping[str, Any],
        autocast: AutocastState,
        values: CallValues | None,
    ) -> OpaqueForm | None:
        for b in self._alike(path, arguments, autocast):
            if self._goes(b, path, values):
                self.used[path] = b
                self.met.setdefault(b)
                return self.blocks[b].form
        return None

    def _alike(
        self, path: str, arguments: Mapping[str, Any], autocast: AutocastState
    ) -> Iterator[int]:
        """The distinct blocks that a call of a module may be one of, whatever its values are."""
        unused = self._unused_of(path)
        for b, block in enumerate(self.blocks):
            if (
                (block.unused, block.autocast) == (unused, autocast)
                and difference(block.arguments, arguments) is None
                and self._looks[path] == block.looks
                and reads_the_same(block, self.modules[path])
            ):
                yield b

    def _goes(self, b: int, path: str, values: CallValues | None) -> bool:
        """Whether the values of a call lead through the module as through a distinct block."""
        block, key = self.blocks[b], (path, self._unused_of(path))
        if not block.asks:
            return True
        if key in self.ways or values is None:
            return self.ways.get(key) == b
        if not takes_same_way(block.captured.step, self.modules[path], values):
            return False
        self.ways[key] = b
        return True

    def _unused_of(self, path: str) -> frozenset[int]:
        return self.unused.get(path, frozenset())

    def _capture(self, unknown: UnknownFormError) -> None:
        """Capture a block by a call that was seen, under the autocast of that call.

        Raises
        ------
        ValuesNeededError
            When its code asks for values of the call, and the call has none.
        """
        path, values = unknown.path, unknown.values
        module, unused = self.modules[path], self._unused_of(path)
        try:
            to_json(unknown.arguments)
        except TypeError as error:
            raise UnfitBlockError(
                path,
                f"block {path!r} cannot have a plan of its own: {error}. Call the model so that it "
                "passes tensors and plain values to its blocks (use_cache=False, say)",
                by_itself=True,
            ) from error
        refuse_divided_call(path, unknown.arguments)
        try:
            captured = self._captured_as_called(module, unknown, unused)
            form = OpaqueForm.of(captured)
        except CaptureError as error:
            if isinstance(error, UnknownValueError) and values is None:
                raise ValuesNeededError(path, error) from error
            raise UnfitBlockError(
                path, f"block {path!r} cannot have a plan of its own: {error}", by_itself=True
            ) from error
        asks = values is not None and bool(captured.step.checks)
        if asks:
            self.ways[path, unused] = len(self.blocks)
        self.blocks.append(
            DistinctBlock(
                path=path,
                module=weakref.ref(module),
                looks=self._looks[path],
                arguments=unknown.arguments,
                captured=captured,
                form=form,
                autocast=unknown.autocast,
                unused=unused,
                asks=asks,
            )
        )

    def _captured_as_called(
        self, module: nn.Module, unknown: UnknownFormError, unused: frozenset[int]
    ) -> CapturedStep:
        """The step of a block; values of its call are looked at only where its code asks."""
        arguments, autocast, values = unknown.arguments, unknown.autocast, unknown.values
        try:
            if any(self.blocks[b].asks for b in self._alike(unknown.path, arguments, autocast)):
                raise UnknownValueError("its code asks for values of what it is called with")
            return self._captured(module, arguments, unused)
        except UnknownValueError:
            if values is None:
                raise
        with values.drawing():
            return self._captured(module, values.arguments, unused, values.computed)

    def _captured(
        self,
        module: nn.Module,
        arguments: Mapping[str, Any],
        unused: frozenset[int],
        computed: frozenset[int] = frozenset(),
    ) -> CapturedStep:
        def captured(loss: LossSpec | None) -> CapturedStep:
            return capture_step(
                module,
                arguments,
                loss=loss,
                forward=original_forward(module),
                target=self.target,
                cost_model=self.spec.cost_model,
                progress=self.progress,
                computed=computed,
            )

        whole = captured(None)
        return captured(_without(whole, unused)) if unused else whole

    def _note_unused(self, seen: list[SeenCall], without_gradient: Mapping[int, set[int]]) -> bool:
        """Note outputs that nobody differentiates; return whether there were unknown ones."""
        for call in seen:
            missing = without_gradient.get(call.number)
            if missing:
                if missing >= set(call.form.differentiated):
                    raise UnfitBlockError(
                        call.path,
                        f"the loss does not depend on block {call.path!r}: leave it out of blocks=",
                    )
                self.unused[call.path] = self._unused_of(call.path) | missing
        return bool(without_gradient)


def _without(captured: CapturedStep, unused: frozenset[int]) -> LossSpec:
    """The loop's part of a block's step in which some outputs get no gradient."""
    step = captured.step
    kept = tuple(i for i in step.differentiated if i not in unused)
    tangents = dict(zip(step.differentiated, step.tangents, strict=True))
    values = [tangents[i].meta["val"] for i in kept]
    return LossSpec.of(
        LossRegion(
            source=LossSource.LOSS_FN, held_bytes=sum(value.element_size() for value in values)
        ),
        kept,
        values,
        [node.meta["val"] for node in step.outputs],
    )
