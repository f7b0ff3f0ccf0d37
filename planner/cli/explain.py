"""The command that says why a plan is as it is: ``remat explain``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..explaining.explain import MORE, TIME_LIMIT_S
from ..explaining.explanation import NUM_LINES
from .answers import Answer, AsJson, command, say_error
from .arguments import PlanFile, load_plan


@command
def explain_command(
    path: PlanFile,
    more: Annotated[
        str,
        typer.Option(
            help="ask what this much more memory would buy: 1GB, or a share of the budget such as "
            "5%; 0 for nothing"
        ),
    ] = MORE,
    time_limit_s: Annotated[float, typer.Option(help="for solving that")] = TIME_LIMIT_S,
    lines: Annotated[int, typer.Option(min=1, help="of each table")] = NUM_LINES,
    as_json: AsJson = False,
) -> Answer:
    """What fills a plan's peak and why, what it recomputes, what more memory would buy."""
    plan = load_plan(path)
    try:
        found = plan.explain(
            more=0 if more.strip() == "0" else more,
            time_limit_s=time_limit_s,
            progress=sys.stderr.isatty(),
        )
    except ValueError as error:
        say_error(error)
    return Answer(text=found.report(lines), data=found.to_dict())
