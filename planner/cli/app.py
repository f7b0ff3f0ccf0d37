"""The command ``remat``: make plans from the shell, and look into plan files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from ..comparing.machine import version_of
from .answers import EPILOG
from .compare import compare_command
from .doctor import doctor_command
from .explain import explain_command
from .export import export_command
from .frontier import frontier_command
from .many_devices import estimate_mesh_command, pipeline_command
from .plans import plan_command, schema_command, show_command
from .shapes import estimate_command, max_batch_command
from .validate import validate_command


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"remat-planner {version_of('remat-planner') or 'of a checkout'}")
        raise typer.Exit


app = typer.Typer(
    help="Train a PyTorch model under a byte budget: plan what to recompute.",
    epilog=EPILOG,
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


COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan_command,
    "show": show_command,
    "explain": explain_command,
    "validate": validate_command,
    "export": export_command,
    "estimate": estimate_command,
    "max-batch": max_batch_command,
    "frontier": frontier_command,
    "estimate-mesh": estimate_mesh_command,
    "pipeline": pipeline_command,
    "compare": compare_command,
    "doctor": doctor_command,
    "schema": schema_command,
}
"""Commands by name, in the order of ``--help``."""

for _name, _command in COMMANDS.items():
    app.command(_name, epilog=EPILOG)(_command)


def main() -> None:
    """Entry point of the installed command."""
    app()
