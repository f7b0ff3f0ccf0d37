"""The command that tells other tools what to checkpoint: ``remat export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..exporting.export import ExportTarget
from .answers import Answer, AsJson, ExitCode, command, fail, say_error
from .arguments import PlanFile, load_plan


@command
def export_command(
    path: PlanFile,
    to: Annotated[str, typer.Option(help=", ".join(ExportTarget))],
    out: Annotated[Path | None, typer.Option(help="write the code to this file")] = None,
    as_json: AsJson = False,
) -> Answer:
    """Which layers another tool should checkpoint, and what that loses against the plan."""
    plan = load_plan(path)
    try:
        found = plan.export(to)
    except ValueError as error:
        say_error(error)
    said = []
    if out is not None:
        try:
            out.write_text(found.code + "\n", encoding="utf-8")
        except OSError as error:
            fail(str(error))
        said.append(f"written to {out}")
    return Answer(
        text=str(found),
        data=found.to_dict(),
        said=said,
        code=ExitCode.DONE if found.fits else ExitCode.NOTHING_FITS,
    )
