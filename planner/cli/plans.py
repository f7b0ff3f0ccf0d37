"""The commands that make plans and look at plan files: ``remat plan``, ``show`` and ``schema``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CaptureError
from ..optimize import optimize
from ..plan import Plan
from ..saving.serialize import plan_to_dict, schema
from .answers import Answer, AsJson, command, fail, say_error
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
    PlanFile,
    Resident,
    Target,
    check_file,
    load_plan,
    load_target,
    read_autocast,
    read_blocks,
    read_headroom,
    read_holds,
    save_plan,
)
from .drawing import draw_plan

_OF_THE_FILE_ALONE = ("operators", "storages", "schedule", "call", "outcomes")


@command
def plan_command(
    target: Target,
    budget: Annotated[
        str,
        typer.Option(
            help="e.g. 40GB, 40GiB, or 60%, a share of the peak without a plan; a bare number is GB"
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="write the plan to this JSON file")] = None,
    optimizer: OptimizerName = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    cost_model: CostModelName = "roofline",
    headroom: Headroom = None,
    outputs: OutputsWord = "held",
    grads: GradsWord = "none",
    resident: Resident = "0",
    concurrent_calls: Annotated[
        int, typer.Option(help="of the model, before the first of them is differentiated")
    ] = 1,
    distributed: Around = None,
    time_limit_s: Annotated[float, typer.Option(help="for solving")] = 60.0,
    gap: Annotated[float, typer.Option(help="stop when proven to be this near the least time")] = (
        0.001
    ),
    seed: Annotated[int, typer.Option()] = 0,
    reorder: Annotated[
        bool, typer.Option("--reorder", help="let operators run in another order than eager's")
    ] = False,
    blocks: Blocks = None,
    as_json: AsJson = False,
) -> Answer:
    """Plan a model's training step and print the plan."""
    check_file("--out", out)
    dtype = read_autocast(autocast)
    model, sample_input, loss_fn = load_target(target)
    try:
        made = optimize(
            model,
            sample_input,
            budget=budget,
            loss_fn=loss_fn,
            optimizer=optimizer,
            device=device,
            autocast=dtype,
            cost_model=cost_model,
            headroom=read_headroom(headroom),
            **read_holds(outputs, grads, resident, distributed),
            concurrent_calls=concurrent_calls,
            time_limit_s=time_limit_s,
            gap=gap,
            seed=seed,
            reorder=reorder,
            **read_blocks(blocks),
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, ValueError) as error:
        say_error(error)
    said = [] if out is None else [save_plan(made, out)]
    return Answer(text=str(made), data=_figures(made), said=said)


@command
def show_command(
    path: PlanFile,
    plots: Annotated[
        Path | None, typer.Option(help="draw its memory and its layers into this folder")
    ] = None,
    name: Annotated[str, typer.Option(help="of the model, above the figures")] = "",
    as_json: AsJson = False,
) -> Answer:
    """Check a plan file and print what it says; draw it."""
    plan = load_plan(path)
    said: list[str] = []
    if plots is not None:
        try:
            said = [f"drawn {drawn}" for drawn in draw_plan(plan, plots, name)]
        except (OSError, ImportError) as error:
            fail(str(error))
    return Answer(text=str(plan), data=_figures(plan), said=said)


@command
def schema_command(
    as_json: Annotated[bool, typer.Option("--json", help="it always is")] = False,
) -> Answer:
    """Print the JSON Schema of plan files."""
    return Answer(text=json.dumps(schema(), indent=2), data=schema())


def _figures(plan: Plan) -> dict[str, Any]:
    """Return what a plan file says but for the graph, the call and the schedule themselves."""
    said = plan_to_dict(plan)
    return {name: part for name, part in said.items() if name not in _OF_THE_FILE_ALONE} | {
        "num_operators": plan.graph.num_operators,
        "num_recomputed": sum(plan.schedule.recomputed().values()),
    }
