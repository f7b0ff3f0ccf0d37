"""The command that runs a plan and holds it to its word: ``remat validate``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import torch
import typer

from graph_capture.calls.autocast import autocast_as

from ..errors import CaptureError
from .answers import Answer, AsJson, ExitCode, command, fail, say_error
from .arguments import OptimizerName, PlanFile, Target, load_plan, load_target


@command
def validate_command(
    path: PlanFile,
    target: Target,
    optimizer: OptimizerName = None,
    repeats: Annotated[int, typer.Option(min=0, help="pairs of steps that are timed")] = 10,
    unplanned: Annotated[
        bool, typer.Option("--unplanned/--no-unplanned", help="run steps without the plan, too")
    ] = True,
    bits: Annotated[
        bool, typer.Option("--bits/--no-bits", help="compare loss, gradients and buffers")
    ] = True,
    seed: Annotated[int, typer.Option(help="of the random generators in each step")] = 0,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="compile stretches of the plan, and compare up to rounding; CPU only"
        ),
    ] = False,
    as_json: AsJson = False,
) -> Answer:
    """Run real steps by a plan file; fails where the peak is above the budget or results differ."""
    plan = load_plan(path)
    model, sample_input, loss_fn = load_target(target)
    dtype = plan.guard.autocast
    under = nullcontext() if dtype is None else autocast_as(plan.device_type, getattr(torch, dtype))
    try:
        with under:
            found = plan.validate(
                model,
                sample_input,
                loss_fn=loss_fn,
                optimizer=optimizer,
                repeats=repeats,
                unplanned=unplanned,
                bits=bits,
                seed=seed,
                compile=compiled,
            )
    except (CaptureError, ValueError) as error:
        say_error(error)
    except torch.OutOfMemoryError as error:
        fail(str(error))
    return Answer(
        text=str(found),
        data=found.to_dict(),
        code=ExitCode.DONE if found.as_promised else ExitCode.NOT_AS_PROMISED,
    )
