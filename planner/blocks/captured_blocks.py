"""Capture a step's blocks by their real calls, and the rest of the step around them.

The rest is captured with the blocks as operators of their own kind
(``graph_capture/opaque_calls.py``). At the first call of a block that is not known yet the
capture ends, this block is captured by that call, and the capture begins again.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from graph_capture.autocast import AutocastState
from graph_capture.call_spec import TensorSpec, difference, specs_of, to_json
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.errors import CaptureError
from graph_capture.loss import LossRegion, LossSource, LossSpec
from graph_capture.opaque_calls import (
    CheckpointedCallError,
    OpaqueCalls,
    OpaqueForm,
    SeenCall,
    UnknownFormError,
)
from graph_capture.optimizer_step import measure_optimizer
from graph_capture.reads import Where
from graph_capture.snapshots import ABSENT
from graph_capture.snapshots import difference as difference_held
from graph_capture.step_capture import capture_step
from graph_capture.target import Target

from ..base.forward_slot import original_forward
from ..base.step_spec import StepSpec
from ..errors import PlanError

R = TypeVar("R")


class UnfitBlockError(PlanError):
    """A module cannot have a plan of its own inside this step.

    Parameters
    ----------
    path
        The module.
    message
        Why, and what to do.
    others
        Others that cannot for the same reason.
    by_itself
        Whether the reason lies in the module, so that it holds for all that look alike.
    """

    def __init__(
        self, path: str, message: str, others: Sequence[str] = (), *, by_itself: bool = False
    ) -> None:
        super().__init__(message)
        self.paths = (path, *others)
        self.by_itself = by_itself


MAX_ROUNDS = 200
"""Distinct calls of blocks in a step; a model with more has no blocks that are alike."""


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
    """

    path: str
    module: weakref.ref[nn.Module]
    looks: tuple[Any, ...]
    arguments: Mapping[str, Any]
    captured: CapturedStep
    form: OpaqueForm
    autocast: AutocastState
    unused: frozenset[int]


@dataclass(kw_only=True)
class Known:
    """What several attempts to capture a step have in common.

    Parameters
    ----------
    blocks
        The distinct blocks that were captured.
    why_measured
        Why the rest cannot be captured; ``None`` as long as it can. With fewer or smaller
        blocks it cannot either.
    """

    blocks: list[DistinctBlock] = field(default_factory=list)
    why_measured: CaptureError | None = None


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
                self._check(seen, calls.out_of_order)
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
                and _reads_the_same(block, self.modules[path])
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

    def _check(self, seen: list[SeenCall], out_of_order: Mapping[int, int | str]) -> None:
        called = Counter(call.path for call in seen)
        twice = [path for path, count in called.items() if count > 1]
        if twice:
            raise UnfitBlockError(
                twice[0],
                f"block {twice[0]!r} is called {called[twice[0]]} times in one step, and a plan "
                "inside it would hold what several calls save: plan the module around it as a "
                "block",
                twice[1:],
            )
        unordered = [call for call in seen if call.number in out_of_order]
        if unordered:
            call, leaf = unordered[0], out_of_order[unordered[0].number]
            name = tensor_names(call.arguments)[leaf] if isinstance(leaf, int) else leaf
            raise UnfitBlockError(
                call.path,
                f"block {call.path!r} uses {name!r} more than once, and others use it later: "
                "its gradients would be added in another order than eager's, with other last "
                "bits. Name smaller blocks, or leave this one out of blocks=",
                [other.path for other in unordered[1:]],
            )
        self._refuse_shared_casts()
        never = [path for path in self.modules if path not in called]
        if never:
            raise UnfitBlockError(
                never[0],
                f"block {never[0]!r} is not called with gradients in this step (eval mode, "
                "no_grad, a branch that is not taken?): leave it out of blocks=",
                never[1:],
            )

    def _refuse_shared_casts(self) -> None:
        """Refuse blocks that share with others a parameter which autocast casts once for all.

        Eager adds the gradients of the cast, and casts their sum; a planned block has a cast of
        its own, and adds what has been cast.
        """
        users: dict[int, set[str]] = {}
        for path, module in self.model.named_modules():
            block = next((b for b in self.modules if path == b or path.startswith(f"{b}.")), path)
            for parameter in vars(module)["_parameters"].values():
                users.setdefault(id(parameter), set()).add(block)
        shared: dict[str, str] = {}
        for path, module in self.modules.items():
            autocast = self.blocks[self.used[path]].autocast if path in self.used else None
            if autocast is None or autocast.dtype is None or not autocast.caches:
                continue
            for name, parameter in module.named_parameters():
                is_cast = parameter.dtype == torch.float32 and parameter.requires_grad
                if is_cast and len(users[id(parameter)]) > 1:
                    shared.setdefault(path, name)
        if shared:
            path, name = next(iter(shared.items()))
            raise UnfitBlockError(
                path,
                f"block {path!r} shares {name!r} with modules outside of it, and autocast casts it "
                "once for all of them: its gradients would be added after the cast back and not "
                "before, with other bits than eager's. Name other blocks, switch the cache off "
                "(torch.autocast(cache_enabled=False)), or plan the whole step",
                [other for other in shared if other != path],
            )


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
    return parts, state, tied


def _reads_the_same(block: DistinctBlock, other: nn.Module) -> bool:
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
        if place.where is Where.ATTRIBUTE:
            now = getattr(twin, place.key, ABSENT)
        else:
            now = vars(twin).get(place.key, ABSENT)
        if difference_held(place.held, now, place.label) is not None:
            return False
    return True


def tensor_names(arguments: Mapping[str, Any]) -> list[str]:
    """Return the argument that each tensor of a call is in, in the order of ``tensors_of``."""
    return [name for name in sorted(arguments) for _ in specs_of(arguments[name])]
