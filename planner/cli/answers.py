"""How a command answers: text or JSON on stdout, everything else on stderr, and an exit code."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from graph_capture.printable import printable

from ..errors import InfeasibleBudgetError

P = ParamSpec("P")

AsJson = Annotated[
    bool, typer.Option("--json", help="print JSON on stdout instead of text, errors included")
]


class ExitCode(IntEnum):
    """What a command's exit status says."""

    DONE = 0
    FAILED = 1  # the message on stderr says why
    USAGE = 2  # the command line is wrong
    NOTHING_FITS = 3  # no plan, no batch or no export fits the budget
    NOT_AS_PROMISED = 4  # what was checked is not as promised


EPILOG = (
    "Exit status: 0 done; 1 failed, stderr says why; 2 wrong command line; 3 nothing fits the "
    "budget; 4 what was checked is not as promised. Progress and messages go to stderr."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command found.

    Parameters
    ----------
    text
        For people; ``None`` where it has been printed line by line.
    data
        The same for programs; what is not finite becomes ``null``.
    said
        What was done besides, such as the files that were written.
    failure
        What went wrong after that; with ``code``.
    """

    text: str | None
    data: Mapping[str, Any]
    said: Sequence[str] = ()
    failure: str = ""
    code: ExitCode = ExitCode.DONE


class CommandError(Exception):
    """Ends a command with a message, an exit code, and figures for programs."""

    def __init__(
        self,
        message: str,
        code: ExitCode = ExitCode.FAILED,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.figures = figures or {}


def fail(message: str) -> NoReturn:
    """End the command with a message."""
    raise CommandError(message)


def say_error(error: BaseException) -> NoReturn:
    """End the command with an error's text, notes included."""
    message = "\n".join([str(error), *getattr(error, "__notes__", ())])
    if not isinstance(error, InfeasibleBudgetError):
        raise CommandError(message)
    figures = {
        "budget_bytes": error.budget_bytes,
        "min_budget_bytes": error.min_budget_bytes,
        "lower_bound_bytes": error.lower_bound_bytes,
    }
    raise CommandError(message, ExitCode.NOTHING_FITS, figures)


def command(function: Callable[P, Answer]) -> Callable[P, None]:
    """Make a command of a function that answers.

    A :class:`CommandError` becomes a message on stderr, and with ``as_json`` an object on
    stdout, too.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            answer = function(*args, **kwargs)
        except CommandError as error:
            message = printable(str(error), lines=True)
            typer.echo(f"remat: {message}", err=True)
            if as_json:
                said = {"message": message, "exit_status": int(error.code), **error.figures}
                typer.echo(json.dumps({"error": said}, indent=2))
            raise typer.Exit(int(error.code)) from error
        text = json.dumps(_plain(answer.data), indent=2) if as_json else answer.text
        if text is not None:
            _show(text)
        for line in answer.said:
            typer.echo(line, err=as_json)
        if answer.failure:
            typer.echo(f"remat: {printable(answer.failure, lines=True)}", err=True)
        if answer.code is not ExitCode.DONE:
            raise typer.Exit(int(answer.code))

    return run


def _plain(value: Any) -> Any:
    """Return data with ``None`` where a number is not finite, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(text: str) -> None:
    """Print, with what the encoding of stdout lacks replaced."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "replace").decode(encoding))
