"""Find the values that the code of blocks asks for, in a forward that runs for real.

A block is captured by its call on stand-ins, which have no values. Where its own code asks for
one (``if not torch.isfinite(hidden).all()``), the model's forward runs on the sample, and the
block is captured by the call that it gets there. Its plan holds for the answer, and checks it in
each step. The rest of the step is captured on stand-ins all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graph_capture.apart.computed_calls import Computing
from graph_capture.apart.opaque_calls import OpaqueCalls
from graph_capture.apart.real_calls import RealCalls
from graph_capture.calls.spread_out import refuse_spread_out
from graph_capture.capture_lock import holds_capture_lock
from graph_capture.errors import CaptureError

from .captured_blocks import Capturing, ValuesNeededError
from .real_run import RealRun, failures_told, own_generators_put_back, refuse_unreal
from .unfit_blocks import UnfitBlockError


def find_values(
    capturing: Capturing, arguments: Mapping[str, Any], needed: ValuesNeededError
) -> None:
    """Capture the blocks by the calls that a forward makes which runs for real.

    Parameters
    ----------
    arguments
        Of the model's own forward, by name.
    needed
        Which block asks for values.

    Raises
    ------
    CaptureError
        When forward calls the block in another way than on stand-ins, or not at all.
    UnfitBlockError
        When forward cannot be run here, or the block asks for what no plan can hold.
    """
    before = len(capturing.ways)
    try:
        capturing.rounds(lambda calls, forward: _run(capturing, arguments, calls, forward))
    except CaptureError as error:
        raise UnfitBlockError(
            needed.path,
            f"block {needed.path!r} cannot have a plan of its own: {needed.why}\n"
            f"  Instead of that: {error}",
            by_itself=True,
        ) from error
    if len(capturing.ways) == before:
        raise CaptureError(
            f"on stand-ins the model calls block {needed.path!r} in another way than on its sample"
        )


@holds_capture_lock
def _run(
    capturing: Capturing,
    arguments: Mapping[str, Any],
    calls: OpaqueCalls,
    forward: Callable[..., Any],
) -> None:
    """Run forward for real, with blocks that are known standing for themselves."""
    model, target = capturing.model, capturing.target
    refuse_spread_out(model)
    refuse_unreal(model, arguments, target, "the code of a block asks for values, so forward")
    recorded = RealCalls(target.torch_type)
    calls.making = computing = Computing(recorded, model, target.torch_type)
    try:
        with (
            own_generators_put_back(model),
            failures_told("a real forward on the sample"),
        ):
            RealRun(model, arguments, capturing.spec, recorded).forward(calls.around(forward))
    finally:
        computing.forget()
