"""The commands that look at many shapes: ``remat estimate`` and ``remat max-batch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CaptureError
from ..max_batch import max_batch
from ..sizing.estimate import estimate
from ..sizing.max_batch import LARGEST_BATCH
from .answers import Answer, AsJson, ExitCode, command, say_error
from .arguments import (
    Around,
    Autocast,
    CostModelName,
    DeviceName,
    GradsWord,
    Headroom,
    OptimizerName,
    OutputsWord,
    Resident,
    Target,
    check_file,
    load_target,
    read_autocast,
    read_headroom,
    read_holds,
    read_integers,
    save_plan,
)

BatchDim = Annotated[int, typer.Option(help="which dimension of the inputs is the batch")]


@command
def estimate_command(
    target: Target,
    batch: Annotated[str, typer.Option(help="batch sizes")] = "1,2,4,8,16",
    sequence: Annotated[
        str | None, typer.Option(help="sequence lengths, e.g. 512,1024; else the sample's own")
    ] = None,
    device: DeviceName = None,
    budget: Annotated[
        str | None, typer.Option(help="e.g. 40GB, 40GiB; else the device's memory")
    ] = None,
    optimizer: OptimizerName = None,
    autocast: Autocast = None,
    cost_model: CostModelName = "roofline",
    headroom: Headroom = None,
    outputs: OutputsWord = "held",
    grads: GradsWord = "none",
    resident: Resident = "0",
    distributed: Around = None,
    batch_dim: BatchDim = 0,
    sequence_dim: Annotated[int, typer.Option(help="and which the sequence")] = 1,
    time_limit_s: Annotated[
        float, typer.Option(help="for each search, in rows that do not fit without a plan")
    ] = 3.0,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> Answer:
    """Memory and time of a training step at many shapes; nothing runs."""
    batches = read_integers("--batch", batch)
    lengths = None if sequence is None else read_integers("--sequence", sequence)
    dtype = read_autocast(autocast)
    model, sample_input, loss_fn = load_target(target)
    try:
        estimated = estimate(
            model,
            sample_input,
            device=device,
            batch_sizes=batches,
            sequence_lengths=lengths,
            budget=budget,
            loss_fn=loss_fn,
            optimizer=optimizer,
            autocast=dtype,
            cost_model=cost_model,
            headroom=read_headroom(headroom),
            **read_holds(outputs, grads, resident, distributed),
            batch_dim=batch_dim,
            sequence_dim=sequence_dim,
            time_limit_s=time_limit_s,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, ValueError) as error:
        say_error(error)
    captured = any(row.error is None for row in estimated.rows)
    return Answer(
        text=str(estimated),
        data=estimated.to_dict(),
        failure="" if captured else "the step cannot be captured at any of these shapes",
        code=ExitCode.DONE if captured else ExitCode.FAILED,
    )


@command
def max_batch_command(
    target: Target,
    budget: Annotated[
        str | None,
        typer.Option(
            help="40GB, or 100% of the sample's peak without a plan; else the device's memory"
        ),
    ] = None,
    device: DeviceName = None,
    optimizer: OptimizerName = None,
    autocast: Autocast = None,
    cost_model: CostModelName = "roofline",
    headroom: Headroom = None,
    outputs: OutputsWord = "held",
    grads: GradsWord = "none",
    resident: Resident = "0",
    distributed: Around = None,
    batch_dim: BatchDim = 0,
    largest: Annotated[int, typer.Option(help="no batch above it is tried")] = LARGEST_BATCH,
    time_limit_s: Annotated[
        float | None,
        typer.Option(help="for searching and solving; else 10 to 60 s, by the step's size"),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="write the plan for the largest batch to this file")
    ] = None,
    as_json: AsJson = False,
) -> Answer:
    """Find the largest batch that fits, without a plan and with one."""
    check_file("--out", out)
    dtype = read_autocast(autocast)
    model, sample_input, loss_fn = load_target(target)
    try:
        found = max_batch(
            model,
            sample_input,
            budget=budget,
            device=device,
            loss_fn=loss_fn,
            optimizer=optimizer,
            autocast=dtype,
            cost_model=cost_model,
            headroom=read_headroom(headroom),
            **read_holds(outputs, grads, resident, distributed),
            batch_dim=batch_dim,
            largest=largest,
            time_limit_s=time_limit_s,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, ValueError) as error:
        say_error(error)
    said = [] if out is None else [save_plan(found.plan, out)]
    return Answer(text=str(found), data=found.to_dict(), said=said)
