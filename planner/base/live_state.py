"""What the process that made a plan knows besides it, and no file stores."""

from __future__ import annotations

from dataclasses import dataclass

from graph_capture.captured_step import CapturedStep

from .module_structure import Structure
from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """What the process that made a plan knows besides it.

    Parameters
    ----------
    captured
        The step that was planned, under the user's own rules. It does not keep the
        model alive.
    structure
        The model's structure at that time.
    request
        The request; ``None`` for a plan that came from a file.
    """

    captured: CapturedStep
    structure: Structure
    request: Request | None
