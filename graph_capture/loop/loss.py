"""What the training loop does between forward and backward, and what that costs.

The loss stays in the user's loop and runs eagerly, so its memory is metered on
real lifetimes instead of being planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch

from ..calls.call_spec import TensorSpec
from ..calls.storage_id import storage_id
from ..costs.cost_model import Call
from ..errors import NotFittingError
from ..private_torch import dispatch
from ..private_torch.autograd import next_sequence_number, sequence_number_of
from ..reads.undone import undone
from ..recording.backward_walk import Differentiator
from ..recording.outputs import OutputTemplate, find_loss
from ..recording.real_results import RealResults
from ..values.asked_numbers import AskedNumber
from ..values.loss_values import LossValues, TrainersLoss, derivatives_through_model_refused
from .lent_outputs import LentOutputs
from .memory_meter import MemoryMeter, Moment

LossFn = Callable[[Any], torch.Tensor]


class LossSource(StrEnum):
    """Where the loss of a step comes from, by a code that files and graphs keep."""

    OUTPUT = "output"  # forward returns it
    OUTPUT_LOSS = "output.loss"  # forward returns it beside other things
    LOSS_FN = "loss_fn"  # a function of the output makes it
    OUTPUTS = "outputs"  # the loop makes it; every output that wants a gradient gets one


@dataclass(frozen=True, kw_only=True)
class LossRegion:
    """What the training loop does between forward and backward.

    Parameters
    ----------
    source
        Where the loss comes from.
    held_bytes
        Bytes that stay allocated afterwards beside the tangents: the loss, its own
        gradient, and the element that stands for each tangent handed over (see
        ``planner.running.planned_step``).
    constant_bytes
        Bytes of the tensors that ``loss_fn`` brings along (targets).
    workspace_bytes
        Bytes held only while it runs.
    calls
        ``(func, args, kwargs, out)`` with meta tensors, for costing.
    moments
        For each call what is allocated when it has its results, beside ``held_bytes``
        and the tangents; may be negative. ``gone`` are outputs that nobody holds by then.
    """

    source: LossSource
    held_bytes: int = 0
    constant_bytes: int = 0
    workspace_bytes: int = 0
    calls: tuple[tuple[Any, tuple, dict, Any], ...] = ()
    moments: tuple[Moment, ...] = ()

    def without(self, gone_bytes: Mapping[int, int]) -> LossRegion:
        """Return a copy for which outputs do not count once they are let go of.

        Parameters
        ----------
        gone_bytes
            Of the outputs of which that is so, by index; one for each memory.
        """
        if not gone_bytes or not self.moments:
            return self
        moments = tuple(
            moment._replace(
                live_bytes=moment.live_bytes - sum(gone_bytes.get(i, 0) for i in moment.gone)
            )
            for moment in self.moments
        )
        most = max(moment.live_bytes for moment in moments)
        return replace(self, workspace_bytes=max(0, most), moments=moments)

    def with_scratch(self, scratch_bytes: Callable[[Call], int]) -> LossRegion:
        """Return a copy that includes its kernels' scratch memory.

        Parameters
        ----------
        scratch_bytes
            What a call allocates and frees again beside its results.
        """
        workspace_bytes = self.workspace_bytes
        for (func, args, kwargs, out), moment in zip(self.calls, self.moments, strict=True):
            call = Call(
                func=func, args=args, kwargs=kwargs, out=out, grad_enabled=moment.grad_enabled
            )
            workspace_bytes = max(workspace_bytes, moment.live_bytes + scratch_bytes(call))
        return replace(self, workspace_bytes=workspace_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TangentMemory:
    """Where the gradient of an output is stored.

    Parameters
    ----------
    block
        Number of the block of memory; gradients of one block share it.
    size_bytes
        Of the whole block.
    offset
        Elements of the block before the gradient's first one.
    output
        Index of an output that lies in the block, too; ``None`` where none does.
    """

    block: int
    size_bytes: int
    offset: int
    output: int | None = None


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """A loss as an earlier capture saw it, for capturing again without its code.

    Parameters
    ----------
    region
        Without its calls.
    differentiated
        Indices of the differentiated output tensors.
    tangents
        What the gradient of each looks like.
    memory
        Where each lies; empty where each fills a block of its own.
    """

    region: LossRegion
    differentiated: tuple[int, ...]
    tangents: tuple[TensorSpec, ...]
    memory: tuple[TangentMemory, ...] = ()

    @classmethod
    def of(
        cls,
        region: LossRegion,
        differentiated: tuple[int, ...],
        tangents: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> LossSpec:
        """Describe the result of :func:`differentiate`."""
        specs = tuple(TensorSpec.of(t) for t in tangents)
        output_of = {storage_id(t): i for i, t in reversed(list(enumerate(outputs)))}
        blocks: dict[int, int] = {}
        memory = tuple(
            TangentMemory(
                block=blocks.setdefault(storage_id(t), len(blocks)),
                size_bytes=t.untyped_storage().nbytes(),
                offset=int(t.storage_offset()),
                output=output_of.get(storage_id(t)),
            )
            for t in tangents
        )
        alone = len(blocks) == len(tangents) and all(
            (place.offset, place.output, place.size_bytes) == (0, None, spec.extent_bytes)
            for place, spec in zip(memory, specs, strict=True)
        )
        return cls(
            region=replace(region, calls=(), moments=()),
            differentiated=differentiated,
            tangents=specs,
            memory=() if alone else memory,
        )

    def stand_ins(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients like these, uninitialized (fake ones under a fake mode)."""
        if not self.memory:
            return [spec.empty() for spec in self.tangents]
        blocks: dict[int, torch.Tensor] = {}
        made = []
        for spec, place in zip(self.tangents, self.memory, strict=True):
            if place.output is not None:
                same = outputs[place.output].detach().view(spec.dtype)
                made.append(same.as_strided(spec.shape, spec.stride, place.offset))
                continue
            if place.block not in blocks:
                blocks[place.block] = torch.empty(
                    place.size_bytes, dtype=torch.uint8, device=spec.device
                )
            elements = blocks[place.block].view(spec.dtype)
            made.append(elements.as_strided(spec.shape, spec.stride, place.offset))
        return made


def differentiate(
    output: Any,
    template: OutputTemplate,
    tensors: list[torch.Tensor],
    given: LossFn | LossSpec | None,
    differentiator: Differentiator,
    twin: Callable[[torch.Tensor], torch.Tensor] | None = None,
    value_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    real: RealResults | None = None,
    named: Callable[[torch.Tensor], str | None] = lambda _tensor: None,
    stays: Callable[[int], bool] | None = None,
) -> tuple[list[int], list[torch.Tensor], LossRegion]:
    """Return which outputs are differentiated, with which gradients, and what that costs.

    Parameters
    ----------
    twin
        Makes a stand-in for a tensor that ``loss_fn`` brings along (targets) and
        that will lie elsewhere; ``None`` where it lies where it will.
    value_of
        Computes an output on the sample; raises ``UnknowableError`` where there is none.
    real
        Knows how results of real kernels lie.
    named
        What a tensor is of the model or its call, in words; ``None`` for another one.
    stays
        Whether a memory outlives the outputs, where the loop lets go of them once it has
        the loss; ``None`` where it holds them.
    """
    wanting = [i for i, t in enumerate(tensors) if t.requires_grad]
    if not wanting:
        raise NotFittingError(
            "no output of the model requires grad: nothing can be trained. Is a parameter "
            "frozen by mistake, or the model in a no_grad block?"
        )
    if isinstance(given, LossSpec):
        if not set(given.differentiated) <= set(wanting):
            raise NotFittingError(
                f"outputs {given.differentiated} were differentiated when the plan was made; "
                f"of this model's outputs {wanting} require grad"
            )
        for i, spec in zip(given.differentiated, given.tangents, strict=True):
            if (spec.shape, spec.dtype) != (tuple(tensors[i].shape), tensors[i].dtype):
                raise NotFittingError(
                    f"output {template.names[i]!r} is {TensorSpec.of(tensors[i])}, its gradient "
                    f"was {spec} when the plan was made"
                )
        return list(given.differentiated), given.stand_ins(tensors), given.region
    if given is not None:
        return _through_loss_fn(
            template, tensors, wanting, given, differentiator, twin, value_of, real, named, stays
        )
    loss = find_loss(output)
    if loss is not None:
        i = next(i for i, t in enumerate(tensors) if t is loss)
        source = LossSource.OUTPUT if output is loss else LossSource.OUTPUT_LOSS
        return [i], [torch.ones_like(loss)], LossRegion(source=source)
    return (
        wanting,
        [torch.ones_like(tensors[i]) for i in wanting],
        LossRegion(
            source=LossSource.OUTPUTS, held_bytes=sum(tensors[i].element_size() for i in wanting)
        ),
    )


def _through_loss_fn(
    template: OutputTemplate,
    tensors: list[torch.Tensor],
    wanting: list[int],
    loss_fn: LossFn,
    differentiator: Differentiator,
    twin: Callable[[torch.Tensor], torch.Tensor] | None,
    value_of: Callable[[torch.Tensor], torch.Tensor] | None,
    real: RealResults | None,
    named: Callable[[torch.Tensor], str | None],
    stays: Callable[[int], bool] | None,
) -> tuple[list[int], list[torch.Tensor], LossRegion]:
    known = {storage_id(t) for t in tensors}
    first = next_sequence_number()
    values = LossValues(logs_numbers=isinstance(loss_fn, TrainersLoss))
    meter = MemoryMeter(known=known.__contains__, twin=twin, values=values, real=real)
    lent = None if stays is None else LentOutputs.of(tensors, wanting, stays)
    sought: list[Any]  # what gradients are asked for
    if lent is None:
        leaves = {i: tensors[i].detach().requires_grad_() for i in wanting}
        given, sought = [leaves.get(i, t) for i, t in enumerate(tensors)], list(leaves.values())
    else:
        given, sought = lent.given, lent.edges
        for i in tuple(lent.memory):
            meter.lend(lent.memory.pop(i), i)
    if value_of is not None:
        _give_values(values, given, tensors, value_of)
    # Within the meter, what undoes would hold what calls are given.
    traceless = loss_fn.undoing() if isinstance(loss_fn, TrainersLoss) else undone(loss_fn)
    with traceless, meter, derivatives_through_model_refused(named):
        loss = loss_fn(template.build(given, number=partial(AskedNumber, at_once=True)))
        given.clear()
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise NotFittingError(
                f"loss_fn must return a scalar tensor, got {getattr(loss, 'shape', loss)!r}"
            )
        if not loss.requires_grad:
            raise NotFittingError("loss_fn returns a tensor that does not depend on the output")
        _refuse_side_door(loss, first)
        memory, element_bytes = loss.untyped_storage(), loss.element_size()
        outputs = [loss]
        del loss
        with without_autocast():
            found = differentiator.grad(outputs, sought)
    if lent is not None:
        found = tuple(None if g is None else lent.in_step(g, tensors) for g in found)
    pairs = [(i, g) for i, g in zip(wanting, found, strict=True) if g is not None]
    if not pairs:
        raise NotFittingError("loss_fn returns a tensor that does not depend on the output")
    held_bytes = memory.nbytes() + element_bytes + sum(g.element_size() for _, g in pairs)
    tangent_bytes = sum({storage_id(g): g.untyped_storage().nbytes() for _, g in pairs}.values())
    region = LossRegion(
        source=LossSource.LOSS_FN,
        held_bytes=held_bytes,
        constant_bytes=sum(meter.constants.values()),
        workspace_bytes=max(0, meter.peak_bytes - tangent_bytes - held_bytes),
        calls=tuple(meter.calls),
        moments=tuple(
            moment._replace(live_bytes=moment.live_bytes - tangent_bytes - held_bytes)
            for moment in meter.moments
        ),
    )
    return [i for i, _ in pairs], [g for _, g in pairs], region


def _give_values(
    values: LossValues,
    given: list[torch.Tensor],
    tensors: list[torch.Tensor],
    value_of: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    for stand_in, tensor in zip(given, tensors, strict=True):
        values.give(stand_in, partial(value_of, tensor))


def _refuse_side_door(loss: torch.Tensor, first: int) -> None:
    """Whether the loss depends on something that forward computed but did not return.

    Autograd numbers its nodes as they are made (leaves have the largest number).
    """
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if sequence_number_of(node) < first:
            raise NotFittingError(
                f"loss_fn uses a tensor that forward computed ({node.name()}) and did not return, "
                "through an attribute of a module, say; return it from forward"
            )
        todo.extend(following for following, _ in node.next_functions)


@contextmanager
def without_autocast() -> Iterator[None]:
    """A training loop leaves autocast before it calls ``backward()``."""
    with dispatch.without_autocast():
        yield
