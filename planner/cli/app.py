"""The command ``remat``: make plans from the shell, and inspect plan files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..comparing.machine import version_of
from ..errors import CaptureError, PlanError
from ..optimize import optimize
from ..plan import Plan
from ..saving.serialize import schema
from .arguments import (
    Autocast,
    CostModelName,
    DeviceName,
    GradsWord,
    Headroom,
    OptimizerName,
    OutputsWord,
    Resident,
    Target,
    fail,
    load_target,
    read_autocast,
    read_headroom,
    read_holds,
    save_plan,
    say_error,
)
from .compare import compare_command
from .doctor import doctor_command
from .drawing import draw_plan
from .shapes import estimate_command, max_batch_command


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"remat-planner {version_of('remat-planner') or 'of a checkout'}")
        raise typer.Exit


app = typer.Typer(
    help="Train a PyTorch model under a byte budget: plan what to recompute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def remat(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Options of the command itself; ``--version`` is answered by its callback."""


@app.command()
def plan(
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
    time_limit_s: Annotated[float, typer.Option(help="for solving")] = 60.0,
    gap: Annotated[float, typer.Option(help="stop when proven to be this near the least time")] = (
        0.001
    ),
    seed: Annotated[int, typer.Option()] = 0,
    reorder: Annotated[
        bool, typer.Option("--reorder", help="let operators run in another order than eager's")
    ] = False,
) -> None:
    """Plan a model's training step and print the plan."""
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
            **read_holds(outputs, grads, resident),
            time_limit_s=time_limit_s,
            gap=gap,
            seed=seed,
            reorder=reorder,
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, ValueError) as error:
        say_error(error)
    typer.echo(str(made))
    if out is not None:
        save_plan(made, out)


app.command("compare")(compare_command)
app.command("doctor")(doctor_command)
app.command("estimate")(estimate_command)
app.command("max-batch")(max_batch_command)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="a plan file")],
    plots: Annotated[
        Path | None, typer.Option(help="draw its memory and its layers into this folder")
    ] = None,
    name: Annotated[str, typer.Option(help="of the model, above the figures")] = "",
) -> None:
    """Check a plan file and print what it says; draw it."""
    try:
        plan = Plan.load(path)
        typer.echo(str(plan))
        if plots is not None:
            for drawn in draw_plan(plan, plots, name):
                typer.echo(f"drawn {drawn}")
    except (PlanError, OSError, ImportError) as error:
        fail(str(error))


@app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of plan files."""
    typer.echo(json.dumps(schema(), indent=2))


def main() -> None:
    """Entry point of the installed command."""
    app()
