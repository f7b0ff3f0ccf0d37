"""Prediction against measurement: the result of :meth:`planner.Plan.validate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graph_capture.units import format_bytes, format_us

from ..running.compiled_calls import CompiledCalls

Bits = Literal["equal", "right", "WRONG", "different", "not repeatable", "not compared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure, predicted and measured.

    Parameters
    ----------
    name
        What it counts.
    predicted, measured
        In bytes or in microseconds.
    how
        ``"observed"`` if it comes from the device or its tensors, ``"derived"`` if it
        is what other observations leave, ``"given"`` if it is the caller's word.
    """

    name: str
    predicted: float
    measured: float
    how: Literal["observed", "derived", "given"] = "observed"

    @property
    def error(self) -> float:
        """Error of the prediction: ``predicted / measured - 1``; positive if it is too high."""
        if self.measured:
            return self.predicted / self.measured - 1
        return math.inf if self.predicted else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """A plan's predictions compared with real training steps.

    Parameters
    ----------
    peak
        Most bytes alive at once in the planned step.
    reserved_bytes
        On CUDA, the most that the allocator held of the device for planned steps;
        ``None`` on the CPU. Nothing predicts it.
    at_peak
        What the peak consists of. Resident categories are observed from the tensors,
        but for ``"resident"``, the caller's own, which is the plan's word.
        ``"rest"`` is derived: the peak less these, so gradients, outputs, activations,
        temporaries and scratch together. No allocator's record tells them apart.
    predicted_rest
        What the rest was predicted to consist of, by category.
    in_step
        Gradients of parameters and inputs, and the model's outputs, observed at the end
        of the step; not all of them need be alive at the peak.
    step
        Time of the planned step, in microseconds; ``None`` without repeats.
    unplanned_peak, unplanned_step
        Of the step without a plan; ``None`` if that did not run.
    predicted_overhead, overhead, overhead_quartiles
        Planned over unplanned time, less one: predicted; median of pairs that ran back
        to back; their quartiles.
    bits
        Whether outputs, loss, gradients, buffers and the random generator are equal
        with and without the plan, else ``"different"``. Of a compiled plan, ``"right"`` if all
        but the random generator, which must be equal, are the same up to rounding, else
        ``"WRONG"``. ``"not repeatable"``: they differ, and so do two unplanned steps.
    first_difference
        The first thing that was not equal.
    unplanned_note
        Why the unplanned step did not run, if it did not.
    budget_bytes, headroom_bytes
        Of the plan.
    costs, device, torch_version, num_threads, seed, num_pairs
        Where the predicted times come from, and where and how the step was measured.
    compiled
        What of the step ran as compiled code; ``None`` if the plan was not to be compiled. The
        predicted peak is then that of this code and of the calls between; predicted times are
        those of eager calls.
    gradient_error, tolerance
        Of a compiled plan: the largest error of a gradient, relative to its own norm (or to a
        small share of all gradients' norm), and from which one the step counts as ``"WRONG"``.
    """

    peak: Figure
    reserved_bytes: int | None
    at_peak: tuple[Figure, ...]
    predicted_rest: Mapping[str, int]
    in_step: tuple[Figure, ...]
    step: Figure | None
    unplanned_peak: Figure | None
    unplanned_step: Figure | None
    predicted_overhead: float
    overhead: float | None
    overhead_quartiles: tuple[float, float] | None
    bits: Bits
    first_difference: str | None
    unplanned_note: str | None
    budget_bytes: int
    headroom_bytes: int
    costs: str
    device: str
    torch_version: str
    num_threads: int
    seed: int
    num_pairs: int
    compiled: CompiledCalls | None = None
    gradient_error: float | None = None
    tolerance: float | None = None

    @property
    def as_promised(self) -> bool:
        """Whether the peak is within the budget, and the results are not others than eager's."""
        return self.within_budget and self.bits not in ("different", "WRONG")

    @property
    def within_budget(self) -> bool:
        """Whether the measured peak is within the budget."""
        return self.peak.measured <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON, each figure with its error."""

        def figure(f: Figure | None) -> dict[str, Any] | None:
            if f is None:
                return None
            error = f.error if math.isfinite(f.error) else None
            return {**asdict(f), "error": error}

        error = self.gradient_error
        return {
            **asdict(self),
            "within_budget": self.within_budget,
            "compiled": None if self.compiled is None else self.compiled.to_dict(),
            "gradient_error": None if error is None or not math.isfinite(error) else error,
            **{
                name: figure(getattr(self, name))
                for name in ("peak", "step", "unplanned_peak", "unplanned_step")
            },
            "at_peak": [figure(f) for f in self.at_peak],
            "in_step": [figure(f) for f in self.in_step],
            "predicted_rest": dict(self.predicted_rest),
            "overhead_quartiles": self.overhead_quartiles and list(self.overhead_quartiles),
        }

    def __str__(self) -> str:
        lines = [
            *self._warnings(),
            f"Validation on {self.device} (torch {self.torch_version}, {self.num_threads} threads, "
            f"seed {self.seed})",
            f"  times are predicted by {self.costs}{', of eager calls' * bool(self.compiled)}",
            f"  {'':<28}{'predicted':>12}{'measured':>12}{'error':>10}",
            _bytes_line("peak of the planned step", self.peak),
        ]
        if self.unplanned_peak is not None:
            lines.append(_bytes_line("peak of the unplanned step", self.unplanned_peak))
        if self.reserved_bytes is not None:
            held = self.reserved_bytes - int(self.peak.measured)
            lines.append(
                f"  {'reserved by the allocator':<28}{'–':>12}"
                f"{format_bytes(self.reserved_bytes):>12}   {format_bytes(held)} more than the peak"
            )
        for name, step in (("planned", self.step), ("unplanned", self.unplanned_step)):
            if step is not None:
                lines.append(_line(f"{name} step", step, format_us))
        lines += self._overhead()
        lines.append("  at the peak")
        lines += [_bytes_line(f"  {_words(f)}", f) for f in self.at_peak]
        if self.predicted_rest:
            parts = ", ".join(
                f"{name.replace('_', ' ')} {format_bytes(n)}"
                for name, n in self.predicted_rest.items()
            )
            lines.append(f"      of the rest was predicted: {parts}")
        lines.append("  in the whole step")
        lines += [_bytes_line(f"  {_words(f)}", f) for f in self.in_step]
        lines += [f"  budget    {self._budget()}", f"  bits      {self._bits()}"]
        if self.compiled is not None:
            lines.append(f"  compiled  {self.compiled}")
        if self.unplanned_note is not None:
            lines.append(f"  unplanned {self.unplanned_note}")
        return "\n".join(lines)

    def _warnings(self) -> list[str]:
        lines = []
        if not self.within_budget:
            over = format_bytes(int(self.peak.measured) - self.budget_bytes)
            lines.append(
                f"OVER BUDGET: the measured peak is {over} above {format_bytes(self.budget_bytes)} "
                f"({int(self.peak.measured)} bytes of {self.budget_bytes})"
            )
        elif self.reserved_bytes is not None and self.reserved_bytes > self.budget_bytes:
            over = format_bytes(self.reserved_bytes - self.budget_bytes)
            lines.append(
                f"RESERVED OVER BUDGET: the allocator held {over} more than "
                f"{format_bytes(self.budget_bytes)}; expandable segments or more headroom help"
            )
        if self.bits == "different":
            lines.append(f"OTHER BITS: with the plan {self.first_difference} differs")
        if self.bits == "WRONG":
            lines.append(f"WRONG RESULTS: with the compiled plan {self.first_difference}")
        return lines

    def _overhead(self) -> list[str]:
        if self.overhead is None or self.overhead_quartiles is None:
            return []
        low, high = self.overhead_quartiles
        return [
            f"  {'overhead':<28}{self.predicted_overhead:>+12.1%}{self.overhead:>+12.1%}   "
            f"quartiles {low:+.1%} to {high:+.1%}, {self.num_pairs} pairs"
        ]

    def _budget(self) -> str:
        headroom = f", {format_bytes(self.headroom_bytes)} of it headroom" * bool(
            self.headroom_bytes
        )
        kept = "kept" if self.within_budget else "EXCEEDED"
        return f"{format_bytes(self.budget_bytes)}{headroom}: {kept}"

    def _bits(self) -> str:
        if self.bits == "equal":
            return "outputs, loss, gradients, buffers and random state equal the unplanned step's"
        if self.bits == "not repeatable":
            return f"unknown: {self.first_difference} differs between two unplanned steps"
        if self.bits == "different":
            return f"{self.first_difference} differs from the unplanned step's"
        if self.bits == "right":
            return (
                "right: outputs, loss, gradients and buffers are the unplanned eager step's up to "
                f"rounding (gradients within {self.gradient_error:.1e} of their norms, wrong from "
                f"{self.tolerance:.0e}); random state equals its"
            )
        if self.bits == "WRONG":
            return f"WRONG: {self.first_difference}, beyond the rounding of compiled kernels"
        return "not compared"


def _words(figure: Figure) -> str:
    return f"{figure.name.replace('_', ' ')} ({figure.how})"


def _bytes_line(name: str, figure: Figure) -> str:
    return _line(name, figure, lambda n: format_bytes(int(n)))


def _line(name: str, figure: Figure, show: Any) -> str:
    error = f"{figure.error:+.2%}" if math.isfinite(figure.error) else "–"
    if figure.predicted == figure.measured:
        error = "exact"
    return f"  {name:<28}{show(figure.predicted):>12}{show(figure.measured):>12}{error:>10}"
