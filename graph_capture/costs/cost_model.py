"""The interface of cost models: how long one call takes on a device.

Three are built in: :class:`~.roofline.Roofline` (from shapes and a data sheet),
:class:`~.profile.Profile` (timed on the device) and :class:`~.user_costs.UserCosts`
(the user's own figures). The plan records which one was used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a step, as the recorder saw it.

    Parameters
    ----------
    func
        The ``OpOverload`` that is called.
    args, kwargs, out
        Its arguments and outputs; tensors of any kind, only metadata is read.
    grad_enabled
        Whether it runs with grad mode on (some kernels save more then).
    """

    func: Any
    args: tuple
    kwargs: dict
    out: Any
    grad_enabled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRecord:
    """Which cost model a plan's times come from.

    Parameters
    ----------
    model
        ``"roofline"``, ``"profile"`` or the name of the user's own.
    device
        The device that the times are for, in words.
    notes
        What a reader of the times must know, such as how many calls fell back
        to another model and why.
    """

    model: str
    device: str
    notes: tuple[str, ...] = ()


@runtime_checkable
class CostModel(Protocol):
    """Estimates how long calls take.

    The same call gets the same answer for as long as the object lives.
    """

    def time_ns(self, call: Call) -> int:
        """Return the nanoseconds of one run."""
        ...

    def record(self) -> CostRecord:
        """Return the requests so far, and where the answers came from."""
        ...


TimingProgress = Callable[[int, int], None]
"""Is told which distinct call is timed next, counted from 1, and how many there are."""


@runtime_checkable
class PreparedCostModel(CostModel, Protocol):
    """A cost model that must know all calls before the first request."""

    def prepare(self, calls: Iterable[Call], progress: TimingProgress | None = None) -> None:
        """Prepare for these calls; may be called again with others."""
        ...

    def save(self) -> None:
        """Save the results for other processes."""
        ...
