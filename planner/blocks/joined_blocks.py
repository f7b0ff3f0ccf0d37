"""Join a step's rest and its blocks, as solvers see them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graph_capture.apart.opaque_calls import OpaqueCalls, SeenCall
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.costs.target import Target
from graph_capture.errors import CaptureError
from graph_capture.loop.loss import LossSpec
from graph_capture.loop.optimizer_step import measure_optimizer
from solvers.block_plans.points import BlockPoints
from solvers.block_plans.stepping import BlockedStep

from ..base.step_spec import StepSpec
from .captured_blocks import Capturing, ValuesNeededError
from .captured_rest import CapturedRest
from .distinct_blocks import DistinctBlock, Known
from .inside_block import InsideBlock
from .measured_rest import MeasuredRest, measured_rest
from .rest import Rest, block_call
from .sharded_groups import sharded_groups
from .sharded_step import sharded_step
from .values_in_blocks import find_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CapturedBlocks:
    """A step that was captured in blocks.

    Parameters
    ----------
    rest
        The rest of the step, captured or measured.
    loss
        Where backward begins.
    measured
        Whether the rest was run for real.
    blocks
        The distinct blocks.
    step
        The same for solvers.
    eager
        The step as eager PyTorch runs it.
    points
        What each distinct block can trade; solved as they are asked for.
    """

    rest: CapturedStep
    loss: LossSpec
    measured: bool
    blocks: tuple[DistinctBlock, ...]
    step: BlockedStep
    eager: BlockedStep
    points: tuple[BlockPoints, ...]


def capture_blocks(
    model: nn.Module,
    arguments: Mapping[str, Any],
    paths: tuple[str, ...],
    *,
    spec: StepSpec,
    target: Target,
    progress: TimingProgress | None = None,
    seed: int = 0,
    known: Known | None = None,
) -> CapturedBlocks:
    """Capture the blocks of a step by the calls that its forward really makes.

    Where the rest of the step cannot be captured, one step is run for real.

    Parameters
    ----------
    arguments
        Of the model's own forward, by name.
    paths
        The blocks.
    known
        What earlier attempts have found out; more is added to it.

    Raises
    ------
    CaptureError
        When the rest of the step can neither be captured nor run.
    UnfitBlockError
        When a block cannot be captured, is called as no plan inside it can be, or would
        give gradients with other last bits.
    """
    known = known or Known()
    capturing = Capturing(model, paths, spec, target, progress, known)
    while known.why_measured is None:
        try:
            try:
                captured, calls = capturing.rest(arguments)
                return _joined(CapturedRest(captured), calls, capturing, seed)
            except ValuesNeededError as needed:
                find_values(capturing, arguments, needed)
        except CaptureError as error:
            logger.debug("the rest is run for real", exc_info=True)
            known.why_measured = error
    rest, calls = _measured(capturing, arguments, known.why_measured)
    return _joined(rest, calls, capturing, seed)


def _measured(
    capturing: Capturing, arguments: Mapping[str, Any], why: CaptureError
) -> tuple[MeasuredRest, list[SeenCall]]:
    """Run the rest for real; where that fails, too, both reasons are in the error."""
    spec, target = capturing.spec, capturing.target
    if spec.holds.sharded is not None:
        raise CaptureError(
            f"{why}\n  One process cannot run a sharded step instead: plan without distributed=, "
            "or change the line"
        ) from why
    optimizer = measure_optimizer(spec.optimizer, capturing.model, target)

    def run(calls: OpaqueCalls, forward: Callable[..., Any]) -> MeasuredRest:
        return measured_rest(
            capturing.model,
            arguments,
            forward,
            calls,
            spec=spec,
            target=target,
            optimizer=optimizer,
            progress=capturing.progress,
        )

    try:
        return capturing.rounds(run)
    except CaptureError as error:
        raise CaptureError(f"{why}\n  Instead of that: {error}") from error


def _joined(rest: Rest, calls: list[SeenCall], capturing: Capturing, seed: int) -> CapturedBlocks:
    blocks = tuple(capturing.blocks)
    of = [capturing.used[call.path] for call in calls]
    # What was captured before its unused outputs were known is not used.
    used = [b for b in capturing.met if b in set(of)]
    of = [used.index(b) for b in of]
    blocks = tuple(blocks[b] for b in used)
    planned = [InsideBlock.planned(block.captured) for block in blocks]
    eager = [InsideBlock.eager(block.captured) for block in blocks]
    holds = capturing.spec.holds
    num_bytes = sum(
        block.captured.step.before_checks.num_bytes for block in (blocks[b] for b in of)
    )
    steps = [
        BlockedStep(
            rest.graph(num_bytes if insides is planned else None),
            tuple(inside.block for inside in insides),
            tuple(
                block_call(rest, call, b, insides[b], holds=insides is planned)
                for call, b in zip(calls, of, strict=True)
            ),
        )
        for insides in (planned, eager)
    ]
    if holds.sharded is not None:
        groups = sharded_groups(capturing.model, rest.captured, calls, holds.sharded)
        steps = [
            sharded_step(step, groups, holds.sharded, accumulates=holds.accumulates)
            for step in steps
        ]
    return CapturedBlocks(
        rest=replace(rest.captured, holds=holds),
        loss=rest.loss,
        measured=rest.measured,
        blocks=blocks,
        step=steps[0],
        eager=steps[1],
        points=tuple(
            BlockPoints(
                inside.block,
                inputs=frozenset(inside.inputs.values()),
                outputs=frozenset(inside.outputs),
                tangents=frozenset(inside.tangents),
                leaving=steps[0].leaving(b),
                seed=seed,
            )
            for b, inside in enumerate(planned)
        ),
    )
