"""What a running solve reports to its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """A better schedule or a better bound was found.

    Parameters
    ----------
    elapsed_s
        Seconds since the solve began.
    incumbent_ns, bound_ns
        Time of the step under the best schedule so far, and the lower bound;
        ``incumbent_ns`` is ``None`` as long as there is no schedule.
    gap
        ``(incumbent - bound) / bound``.
    global_bound_ns
        Lower bound on every schedule whose first runs keep the base order, whereas
        ``bound_ns`` may cover staged schedules only; ``None`` before a solve.
    message
        Who found what.
    solver
        Name of the method that speaks; ``None`` before a solve.
    """

    elapsed_s: float
    incumbent_ns: int | None
    bound_ns: int
    gap: float | None
    message: str
    global_bound_ns: int | None = None
    solver: str | None = None


Progress = Callable[[ProgressEvent], None]
