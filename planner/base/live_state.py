"""What the process that made a plan knows beside it, and no file holds."""

from __future__ import annotations

from dataclasses import dataclass

from graph_capture.captured_step import CapturedStep

from .module_structure import Structure
from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """What the process that made a plan knows beside it.

    Parameters
    ----------
    captured
        The step that was planned, under the user's own rules. It does not keep the
        model alive.
    structure
        How the model was built then.
    request
        What was asked for; ``None`` for a plan that came from a file.
    """

    captured: CapturedStep
    structure: Structure
    request: Request | None
