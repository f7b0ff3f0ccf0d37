"""The request behind a plan, as far as another call of the same model needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import NoneType

from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.loss import LossFn

from .budget import parse_headroom
from .progress import ShowProgress
from .solve_options import SolveOptions
from .step_spec import StepSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of :func:`planner.optimize`, apart from the model and its sample.

    Parameters
    ----------
    budget_bytes, headroom, never_recompute, always_recompute, progress
        As of :func:`planner.optimize`.
    options
        How hard to search for a schedule.
    loss_fn, device, cost_model
        Of the step, for the same step at another shape.

    Raises
    ------
    ValueError
        When one is invalid.
    """

    budget_bytes: int
    headroom: float | str | None = None
    never_recompute: tuple[str, ...] = ()
    always_recompute: tuple[str, ...] = ()
    options: SolveOptions = field(default_factory=SolveOptions)
    loss_fn: LossFn | None = None
    device: str | Device | None = None
    cost_model: CostModelChoice = "roofline"
    progress: ShowProgress = None

    def __post_init__(self) -> None:
        if not isinstance(self.progress, (bool, NoneType)) and not callable(self.progress):
            raise ValueError(f"progress must be True or a function, got {self.progress!r}")
        parse_headroom(self.headroom, self.budget_bytes, "cpu")  # refuse invalid ones at once

    @classmethod
    def of(
        cls,
        spec: StepSpec,
        options: SolveOptions,
        *,
        budget_bytes: int,
        headroom: float | str | None = None,
        never_recompute: Sequence[str] = (),
        always_recompute: Sequence[str] = (),
        progress: ShowProgress = None,
    ) -> Request:
        """Build the request for a plan of a step."""
        return cls(
            budget_bytes=budget_bytes,
            headroom=headroom,
            never_recompute=_patterns("never_recompute", never_recompute),
            always_recompute=_patterns("always_recompute", always_recompute),
            options=options,
            loss_fn=spec.loss_fn,
            device=spec.device,
            cost_model=spec.cost_model,
            progress=progress,
        )


def _patterns(option: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise ValueError(f"{option} takes a sequence of patterns: write ({patterns!r},)")
    return tuple(patterns)
