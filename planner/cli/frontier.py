"""The command that plans one step at many budgets: ``remat frontier``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..comparing.budgets import LEAST_BARE_BYTES
from ..errors import CaptureError, PlanError
from ..frontier import NUM_BUDGETS, frontier
from ..sizing.frontier_report import Frontier
from .answers import Answer, AsJson, ExitCode, command, fail, say_error
from .arguments import (
    Around,
    Autocast,
    Blocks,
    CostModelName,
    DeviceName,
    GradsWord,
    Headroom,
    OptimizerName,
    OutputsWord,
    Resident,
    Target,
    check_folder,
    load_target,
    read_autocast,
    read_blocks,
    read_headroom,
    read_holds,
    read_names,
)


@command
def frontier_command(
    target: Target,
    budgets: Annotated[
        str,
        typer.Option(
            help="how many, evenly from the least that works to the peak without a plan; or which, "
            "e.g. 80%,60%,12GB; a bare number is bytes from 4096 on"
        ),
    ] = str(NUM_BUDGETS),
    blocks: Blocks = None,
    optimizer: OptimizerName = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    cost_model: CostModelName = "roofline",
    headroom: Headroom = None,
    outputs: OutputsWord = "held",
    grads: GradsWord = "none",
    resident: Resident = "0",
    distributed: Around = None,
    time_limit_s: Annotated[float, typer.Option(help="for each plan")] = 5.0,
    gap: Annotated[float, typer.Option(help="stop when proven to be this near the least time")] = (
        0.001
    ),
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="write each plan to a file in this folder")
    ] = None,
    as_json: AsJson = False,
) -> Answer:
    """Plan a training step at many budgets: what each byte costs in time."""
    dtype = read_autocast(autocast)
    text = budgets.strip()
    is_count = text.isascii() and text.isdigit() and int(text) < LEAST_BARE_BYTES
    asked = int(text) if is_count else read_names(text)
    assert asked is not None
    check_folder("--out", out)
    model, sample_input, loss_fn = load_target(target)
    try:
        found = frontier(
            model,
            sample_input,
            budgets=asked,
            **read_blocks(blocks),
            loss_fn=loss_fn,
            optimizer=optimizer,
            device=device,
            autocast=dtype,
            cost_model=cost_model,
            headroom=read_headroom(headroom),
            **read_holds(outputs, grads, resident, distributed),
            time_limit_s=time_limit_s,
            gap=gap,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, ValueError) as error:
        say_error(error)
    none = not found.plans
    return Answer(
        text=str(found),
        data=found.to_dict(),
        said=[] if out is None else _saved(found, out),
        failure="nothing is known to fit any of these budgets" if none else "",
        code=ExitCode.NOTHING_FITS if none else ExitCode.DONE,
    )


def _saved(found: Frontier, folder: Path) -> list[str]:
    """Write the plans, one file for each budget; say which."""
    said = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for point in found.points:
            if point.plan is not None:
                path = folder / f"plan_{point.budget_bytes}.json"
                point.plan.save(path)
                said.append(f"written to {path}")
    except (OSError, PlanError) as error:
        fail(f"--out: {error}")
    return said
