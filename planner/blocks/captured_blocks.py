"""Capture a step's blocks by their real calls, and the rest of the step around them.

The rest is captured with the blocks as operators of their own kind
(``graph_capture/opaque_calls.py``). At the first call of a block that is not known yet the
capture ends, this block is captured by that call, and the capture begins again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from graph_capture.autocast import AutocastState
from graph_capture.call_spec import difference, to_json
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.errors import CaptureError
from graph_capture.loss import LossRegion, LossSource, LossSpec
from graph_capture.opaque_calls import (
    CheckpointedCallError,
    OpaqueCalls,
    SeenCall,
    UnknownFormError,
)
from graph_capture.opaque_form import OpaqueForm
from graph_capture.optimizer_step import measure_optimizer
from graph_capture.step_capture import capture_step
from graph_capture.target import Target

from ..base.forward_slot import original_forward
from ..base.step_spec import StepSpec
from ..errors import PlanError
from .distinct_blocks import DistinctBlock, Known, looks_of, reads_the_same
from .unfit_blocks import UnfitBlockError, refuse_unfit

R = TypeVar("R")

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
        self.blocks = known.blocks
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
            try:
                rest = run(calls, forward)
            except UnknownFormError as unknown:
                with unknown.autocast.holding():
                    self._capture(unknown.path, unknown.arguments, unknown.autocast)
                continue
            except CheckpointedCallError as checkpointed:
                raise PlanError(
                    f"block {checkpointed.path!r} is called by torch.utils.checkpoint, which would "
                    "run it again beside its plan, and the plan decides what is repeated: switch "
                    "gradient checkpointing off (model.gradient_checkpointing_disable() in "
                    "Transformers), or leave the block out of blocks="
                ) from checkpointed
            finally:
                calls.forget()
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
        self, path: str, arguments: Mapping[str, Any], autocast: AutocastState
    ) -> OpaqueForm | None:
        found = self._known(path, arguments, autocast)
        if found is None:
            return None
        self.used[path] = found
        self.met.setdefault(found)
        return self.blocks[found].form

    def _known(
        self, path: str, arguments: Mapping[str, Any], autocast: AutocastState
    ) -> int | None:
        """The distinct block that a call of a module is one of."""
        unused = self.unused.get(path, frozenset())
        for i, block in enumerate(self.blocks):
            if (
                (block.unused, block.autocast) == (unused, autocast)
                and difference(block.arguments, arguments) is None
                and self._looks[path] == block.looks
                and reads_the_same(block, self.modules[path])
            ):
                return i
        return None

    def _capture(self, path: str, arguments: Mapping[str, Any], autocast: AutocastState) -> None:
        """Capture a block by a call that was seen, under the autocast of that call."""
        module = self.modules[path]
        try:
            to_json(arguments)
        except TypeError as error:
            raise UnfitBlockError(
                path,
                f"block {path!r} cannot have a plan of its own: {error}. Call the model so that it "
                "passes tensors and plain values to its blocks (use_cache=False, say)",
                by_itself=True,
            ) from error
        unused = self.unused.get(path, frozenset())
        try:
            captured = self._captured(module, arguments, None)
            if unused:
                captured = self._captured(module, arguments, _without(captured, unused))
            form = OpaqueForm.of(captured)
        except CaptureError as error:
            raise UnfitBlockError(
                path, f"block {path!r} cannot have a plan of its own: {error}", by_itself=True
            ) from error
        self.blocks.append(
            DistinctBlock(
                path=path,
                module=weakref.ref(module),
                looks=self._looks[path],
                arguments=arguments,
                captured=captured,
                form=form,
                autocast=autocast,
                unused=unused,
            )
        )

    def _captured(
        self, module: nn.Module, arguments: Mapping[str, Any], loss: LossSpec | None
    ) -> CapturedStep:
        return capture_step(
            module,
            arguments,
            loss=loss,
            forward=original_forward(module),
            target=self.target,
            cost_model=self.spec.cost_model,
            progress=self.progress,
        )

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
                self.unused[call.path] = self.unused.get(call.path, frozenset()) | missing
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
