"""The command ``remat``: plans from the shell, and a look into plan files."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from torch import nn

from .errors import CaptureError, InfeasibleBudgetError, PlanError
from .optimize import optimize
from .plan import Plan
from .serialize import schema

app = typer.Typer(
    help="Train a PyTorch model under a byte budget: plan what to recompute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(
            help="module:function that returns (model, sample_input) or those and loss_fn"
        ),
    ],
    budget: Annotated[str, typer.Option(help="e.g. 40GB, 40GiB; a bare number is GB")],
    out: Annotated[Path | None, typer.Option(help="write the plan to this JSON file")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="count its state and step, e.g. adamw")
    ] = None,
    time_limit_s: Annotated[float, typer.Option(help="for solving")] = 60.0,
    seed: Annotated[int, typer.Option()] = 0,
    reorder: Annotated[
        bool, typer.Option("--reorder", help="let operators run in another order than eager's")
    ] = False,
) -> None:
    """Plan a model's training step and print the plan."""
    model, sample_input, loss_fn = _load_target(target)
    try:
        made = optimize(
            model,
            sample_input,
            budget_gb=budget,
            loss_fn=loss_fn,
            optimizer=optimizer,
            time_limit_s=time_limit_s,
            seed=seed,
            reorder=reorder,
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, InfeasibleBudgetError, ValueError) as error:
        _fail(str(error))
    typer.echo(str(made))
    if out is not None:
        made.save(out)
        typer.echo(f"written to {out}")


@app.command()
def show(path: Annotated[Path, typer.Argument(help="a plan file")]) -> None:
    """Check a plan file and print what it says."""
    try:
        typer.echo(str(Plan.load(path)))
    except (PlanError, OSError) as error:
        _fail(str(error))


@app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of plan files."""
    typer.echo(json.dumps(schema(), indent=2))


def _load_target(target: str) -> tuple[nn.Module, Any, Callable[[Any], Any] | None]:
    """Call ``module:function``; modules are looked up beside the current folder, too."""
    module_name, _, function_name = target.partition(":")
    if not function_name:
        _fail(f"{target!r} is not of the form module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), function_name)()
    except (ImportError, AttributeError) as error:
        _fail(f"{target}: {error}")
    finally:
        sys.path.pop(0)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        _fail(f"{target} must return (model, sample_input) or (model, sample_input, loss_fn)")
    return made if len(made) == 3 else (*made, None)


def _fail(message: str) -> NoReturn:
    typer.echo(f"remat: {message}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the installed command."""
    app()
