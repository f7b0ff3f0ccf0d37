"""Trace a training step, forward, loss and backward, into one torch.fx graph.

The model runs once on fake tensors under :class:`~graph_capture.recording.recorder.Recorder`,
autograd included, so the graph holds the very calls that eager dispatches.
Nothing is allocated, and the model is left as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..absent_cuda.dispatch_rules import dispatch_as_on, refuse_recurrent
from ..absent_cuda.guard import ensure_cuda_guard
from ..calls.call_spec import leaves_of, objects_of, tensor_names, tensors_of
from ..calls.layouts import refuse_argument
from ..calls.spread_out import divisions_apart, is_spread, refuse_divided, refuse_spread_out
from ..costs.target import Target
from ..errors import AskedInBackwardError, CaptureError, NotFittingError, UnknownValueError
from ..loop.loss import LossFn, LossSpec
from ..private_torch.fake_tensors import FAKE_TENSOR_LOGGER
from ..private_torch.replacing import IS_COMPILING
from ..reads.clocks import ClocksMet
from ..reads.isolation import undisturbed
from ..reads.ledger import Change, make_again
from ..reads.reading import Watcher
from ..reads.snapshots import brief
from ..recording.packed_sequences import sequences_padded
from ..values.constant_values import disguise_fake_tensors
from ..values.outcomes import Handed, read_as_a_whole
from .alike import calls_of, same_step
from .checkpointing import checkpoints_inlined
from .failures import explain_failures, lack_values
from .split_places import split_places_read
from .step_recording import record_step
from .tensor_of_tensors import tensors_of_tensors
from .traced_step import AS_EAGER, COMPILING, TakenPath, TracedStep

logger = logging.getLogger(__name__)


def trace_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None = None,
    *,
    forward: Callable[..., Any],
    target: Target,
    taken: TakenPath | None = None,
    releases_outputs: bool = False,
    computed: frozenset[int] = frozenset(),
) -> TracedStep:
    """Trace ``model`` on ``arguments`` (bound by name, see ``call_spec.bind_call``).

    The first attempt runs the model as it is, so that it takes the branches that
    eager takes on the sample. If it stops at an unknown value that decides a branch,
    the second attempt runs with ``torch.compiler.is_compiling()`` true, for which
    many libraries have a branch-free path.

    Parameters
    ----------
    taken
        The path of an earlier capture, which this capture takes, too.
    releases_outputs
        Whether the loop lets go of the outputs once it has the loss.
    computed
        Tensors of the call, by index, that other modules of a larger step have computed.

    Raises
    ------
    CaptureError
        When neither works; names the line of the model that stopped it.
    """
    refuse_spread_out(model)
    if target.elsewhere and any(map(is_spread, model.parameters())):
        raise NotFittingError(
            f"the model's parameters are DTensors, and the plan is for {target.device.name}, which "
            "is not where they lie: plan a tensor-parallel model on the devices that train it "
            "(device=None), or estimate its ranks before with planner.estimate_mesh"
        )
    for tensor in tensors_of(arguments):
        refuse_argument(tensor)
    refuse_divided(tensors_of(arguments), tensor_names(arguments), "argument")

    def traced() -> tuple[TracedStep, list[Change], ClocksMet]:
        return _first_that_works(
            model, arguments, loss, forward, target, taken, releases_outputs, computed
        )

    step, settled, clocks = traced()
    if clocks.where is not None:
        with clocks.shifted():
            try:
                alike = same_step(traced()[0], step)
            except CaptureError:
                logger.debug("not captured at another time", exc_info=True)
                alike = False
        if not alike:
            raise NotFittingError(
                f"forward reads a clock ({clocks.where}) and computes with the time, which a plan "
                "would repeat for ever; read it in the training loop, and pass the time as an "
                "argument, in a tensor"
            )
    if settled:
        with undisturbed(model, objects_of(arguments)):
            for change in settled:
                make_again(change)
            try:
                second, *_ = traced()
            except CaptureError:  # with half of the first call's changes; this proves nothing
                logger.debug("a second call could not be captured", exc_info=True)
                return step
        if calls_of(second) != calls_of(step):
            name = f"{settled[0].label}.{settled[0].key}".lstrip(".")
            raise NotFittingError(
                f"the second call of forward does something else than the first, which sets "
                f"attribute {name!r} to {brief(settled[0].now)}; run the model once before planning"
            )
    return step


def _first_that_works(
    model: nn.Module,
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None,
    forward: Callable[..., Any],
    target: Target,
    taken: TakenPath | None,
    releases_outputs: bool,
    computed: frozenset[int],
) -> tuple[TracedStep, list[Change], ClocksMet]:
    """The step, the changes that forward makes once to what it reads, and the clocks it names."""
    if target.imitated:
        refuse_recurrent(model)
        ensure_cuda_guard()
    # Code that does with a number what only a real number can do gets the number itself.
    attempts: list[tuple[str, Any, bool]] = [
        (AS_EAGER, disguise_fake_tensors, True),
        (AS_EAGER, disguise_fake_tensors, False),
        (COMPILING, _pretend_compiling, False),
    ]
    if taken is not None:
        attempts = attempts[2:] if taken.branch_free else attempts[:2]
    outcomes = None if taken is None else taken.outcomes
    failures: list[tuple[str, BaseException]] = []
    num_handed = 1
    for how, context, numbers in attempts:
        if how == AS_EAGER and not numbers and not num_handed:
            continue
        handed = Handed()
        watcher = Watcher(model, forward, leaves_of(arguments))
        try:
            with (
                undisturbed(model, objects_of(arguments)),
                checkpoints_inlined(),
                dispatch_as_on(target) if target.imitated else nullcontext(),
                # Without looking for NaN, which asks for values of gradients.
                torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), check_nan=False),
                _quiet_fake_tensors(),
                read_as_a_whole(handed if numbers else None),
                tensors_of_tensors(),
                sequences_padded(),
                split_places_read(),
                divisions_apart(),
                context(),
            ):
                try:
                    step = record_step(
                        watcher,
                        model,
                        forward,
                        arguments,
                        loss,
                        how,
                        target,
                        outcomes,
                        releases_outputs=releases_outputs,
                        computed=computed,
                    )
                finally:
                    watcher.outside.put_back()
                    watcher.caches.forget_stand_ins(watcher.cached)
                    watcher.generators.put_back()
                    watcher.elsewhere.let_go()
            # Values that were read are those after forward's own changes are undone.
            return replace(step, reads=watcher.reads()), watcher.settled, watcher.clocks
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # user code may raise anything on stand-ins; try the next way
            logger.debug("capture %s failed", how, exc_info=True)
            num_handed = handed.num_numbers
            if num_handed:
                continue  # the next attempt says why
            if isinstance(error, (NotFittingError, AskedInBackwardError)):
                raise
            failures.append((how, error))
    kind = UnknownValueError if lack_values(failures) else CaptureError
    raise kind(explain_failures(failures)) from failures[-1][1]


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """Silence torch, which writes errors on fake tensors to stderr before it raises them."""
    its_logger = logging.getLogger(FAKE_TENSOR_LOGGER)
    before = its_logger.level
    its_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        its_logger.setLevel(before)


@contextmanager
def _pretend_compiling() -> Iterator[None]:
    with IS_COMPILING.holding(True):
        yield
