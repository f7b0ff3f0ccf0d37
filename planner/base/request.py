"""The request behind a plan, as far as another call of the same model needs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType

from graph_capture.cost_graph import MAX_TOTAL
from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.loop.loss import LossFn

from .budget import RequestedBudget, parse_headroom
from .progress import ShowProgress
from .solve_options import SolveOptions
from .step_spec import StepSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of :func:`planner.optimize`, apart from the model and its sample.

    Parameters
    ----------
    budget
        The budget, in bytes once the step's peak is known.
    headroom, never_recompute, always_recompute, progress
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

    budget: RequestedBudget
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
        budget_bytes = MAX_TOTAL if self.budget.num_bytes is None else self.budget.num_bytes
        parse_headroom(self.headroom, budget_bytes, "cpu")  # refuse invalid ones at once

    @classmethod
    def of(
        cls,
        spec: StepSpec,
        options: SolveOptions,
        *,
        budget: RequestedBudget,
        headroom: float | str | None = None,
        never_recompute: Sequence[str] = (),
        always_recompute: Sequence[str] = (),
        progress: ShowProgress = None,
    ) -> Request:
        """Build the request for a plan of a step."""
        if options.reorder and spec.holds.concurrent_calls > 1:
            raise ValueError(
                "reorder=True plans one call at a time: leave it out, or plan one call"
            )
        return cls(
            budget=budget,
            headroom=headroom,
            never_recompute=_patterns("never_recompute", never_recompute),
            always_recompute=_patterns("always_recompute", always_recompute),
            options=options,
            loss_fn=spec.loss_fn,
            device=spec.device,
            cost_model=spec.cost_model,
            progress=progress,
        )

    @property
    def budget_bytes(self) -> int:
        """The budget; a share has bytes once it is settled."""
        assert self.budget.num_bytes is not None
        return self.budget.num_bytes

    def settled(self, unplanned_peak_bytes: int) -> Request:
        """Return the request with a budget in bytes.

        Parameters
        ----------
        unplanned_peak_bytes
            Peak of the step without a plan.

        Raises
        ------
        ValueError
            When a share of it comes to nothing, or the headroom takes all of that.
        """
        return replace(self, budget=self.budget.settled(unplanned_peak_bytes))

    @property
    def for_other_calls(self) -> Request:
        """The request with the same bytes, which are no share of another call's peak."""
        return replace(self, budget=RequestedBudget(num_bytes=self.budget_bytes))


def _patterns(option: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise ValueError(f"{option} takes a sequence of patterns: write ({patterns!r},)")
    named = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in named):
        raise ValueError(
            f"{option} takes a sequence of module paths and calls such as ('aten.gelu',), got "
            f"{patterns!r}"
        )
    return named
