"""Compiled steps of one model beside each other, as figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

WRONG = 1e-3
"""Relative error from which gradients in float32 are wrong; kernels that are fused otherwise
differ by some 1e-6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRow:
    """One compiled step.

    Parameters
    ----------
    kind
        ``"unbudgeted"``, ``"pytorch"`` or ``"remat"``.
    ratio
        PyTorch's ratio; for ours the one whose peak is the budget.
    budget_bytes, predicted_bytes
        Of ours.
    peak_bytes
        Measured, of the whole step, parameters and inputs included; ``None`` where nothing ran.
    error
        The largest error of a gradient against the compiled step without a budget, relative to
        the gradient's norm, or to a small share of all gradients'; ``None`` if it is no number.
    tolerance
        The error from which gradients are wrong.
    bits_equal
        Whether all gradients have the same bits.
    time_ratio
        Median time over that of the compiled step without a budget, by alternating pairs;
        ``None`` where none was taken.
    overhead, least_overhead, gap
        Of our plan: estimated extra time, what no schedule falls below, and how far the plan's
        time is above that.
    first_step_s
        Seconds of the first step, compilation included.
    failure
        Why nothing ran.
    """

    kind: Literal["unbudgeted", "pytorch", "remat"]
    ratio: float | None = None
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    error: float | None = None
    tolerance: float = WRONG
    bits_equal: bool = False
    time_ratio: float | None = None
    overhead: float | None = None
    least_overhead: float | None = None
    gap: float | None = None
    first_step_s: float | None = None
    failure: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it ran, and its gradients are others than those of the step without a budget."""
        if self.peak_bytes is None or self.bits_equal:
            return False
        return self.error is None or not self.error <= self.tolerance

    @property
    def is_over_budget(self) -> bool:
        """Whether its measured peak is above its budget."""
        if self.peak_bytes is None or self.budget_bytes is None:
            return False
        return self.peak_bytes > self.budget_bytes

    @property
    def bits(self) -> Literal["equal", "right", "WRONG", "not compared"]:
        """The gradients in a word: equal to the bit, right up to rounding, or wrong."""
        if self.peak_bytes is None:
            return "not compared"
        return "WRONG" if self.is_wrong else "equal" if self.bits_equal else "right"


@dataclass(frozen=True, kw_only=True)
class CompiledRecord:
    """Compiled steps of one model, the one without a budget first.

    Parameters
    ----------
    name
        Of the model.
    lower
        What the graphs were compiled with: ``"inductor"`` or ``"aot_eager"``.
    rows
        The steps.
    eager_peak_bytes
        Measured, of the same step as eager PyTorch runs it; ``None`` if that was not recorded.
    eager_ratio
        Median time of the compiled step without a budget over eager's, by alternating pairs;
        ``None`` where none was taken.
    about
        The machine, its load, the threads and the versions.
    """

    name: str
    lower: str
    rows: tuple[CompiledRow, ...]
    eager_peak_bytes: int | None = None
    eager_ratio: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


__all__ = ["WRONG", "CompiledRecord", "CompiledRow"]
