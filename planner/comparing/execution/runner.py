"""Run a comparison's real steps: eager ones and a plan's, alternately.

:func:`planner.measure` records peaks, and times are taken in turn with eager's
(``measure_pair``). Everything that two successive steps leave is compared with eager's,
as for a peer's steps (:mod:`.step_verdict`). Eager's own results are kept on the CPU, so
that each schedule runs only its own two steps.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from solvers.strategies.strategy import StrategyError

from ...base.forward_slot import forward_set
from ...base.live_state import LiveState
from ...base.preserve_state import preserve_state
from ...base.resident import single_device
from ...base.step_spec import StepSpec
from ...base.training_step import (
    build_optimizer,
    clear_gradients,
    make_step,
)
from ...comparison_record import (
    Bits,
    MeasuredStep,
    RowOutcome,
)
from ...measuring.measure import (
    PairedTiming,
    measure,
    measure_pair,
    quartiles,
    timed_us,
)
from ...measuring.rounding import StepResults, StepVerdict, rounding_dtype
from ...plan_record import PlanRecord
from ...running.out_of_memory import is_out_of_memory
from ...running.planned_forward import PlannedForward
from ...running.recapture import capture_for
from .step_verdict import judge_results
from .training_run import TrainingRun

LONGEST_ERROR = 600
"""How many characters of an error a row keeps."""

_WARMUP_PAIRS = 2
_COMPARED_STEPS = 2

_Forward = Callable[..., Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What real steps run on, and how often; see :func:`planner.compare`."""

    spec: StepSpec
    repeats: int
    seed: int

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return single_device(self.spec.model, self.spec.sample_input)


class Runner:
    """Runs steps on a model whose state the caller restores afterwards.

    Parameters
    ----------
    arguments
        Of the call, by name.
    own
        The model's own forward; ``None`` for its class's.
    live
        What is known besides the plans that will run.
    """

    def __init__(
        self,
        execution: Execution,
        arguments: Mapping[str, Any],
        own: _Forward,
        live: LiveState | None,
    ) -> None:
        self.execution = execution
        self.arguments = arguments
        self.own = own
        self._live = live
        optimizer = execution.spec.optimizer
        if isinstance(optimizer, str):
            optimizer = build_optimizer(optimizer, execution.spec.model.parameters())
        self.optimizer = optimizer
        self._expected: list[StepResults] | None = None
        self._noise = StepVerdict(bits="equal")

    def eager(self) -> MeasuredStep:
        """Eager steps beside eager steps: the machine's noise, and whether bits repeat."""
        self._expected = None
        peak_bytes = self._peak_bytes(self.own)
        with self._training_run(self.own) as run:
            expected = [run.step() for _ in range(_COMPARED_STEPS)]
        self._noise = self._against(expected, self.own)
        self._expected = expected
        return measured_step(
            peak_bytes,
            self._times(self.own, beside=True),
            "equal" if self._noise.bits == "equal" else "not repeatable",
            self._noise.difference,
        )

    def planned(self, plan: PlanRecord) -> MeasuredStep:
        """Run steps by a plan, alongside eager steps where those could run."""
        forward = self._planned_forward(plan)
        bits, difference = self._bits(forward)
        peak_bytes = self._peak_bytes(forward)
        times = self._times(forward, beside=self._expected is not None)
        return measured_step(peak_bytes, times, bits, difference)

    def in_turn(self, first: PlanRecord, second: PlanRecord) -> PairedTiming:
        """Run steps by two plans alternately, as often as requested."""
        return self._pairs(self._planned_forward(first), self._planned_forward(second))

    def _planned_forward(self, plan: PlanRecord) -> PlannedForward:
        model = self.execution.spec.model
        captured = capture_for(plan, self._live, model, model.forward)
        forward = PlannedForward(model, plan, self._live, captured)
        forward.check(self.arguments)
        return forward

    def _peak_bytes(self, forward: _Forward) -> int:
        e = self.execution
        with forward_set(e.spec.model, forward):
            return measure(
                e.spec.model,
                e.spec.sample_input,
                loss_fn=e.spec.loss_fn,
                optimizer=self.optimizer,
                repeats=0,
                seed=e.seed,
                outputs=e.spec.holds.outputs,
                grads=e.spec.holds.grads,
                resident_bytes=e.spec.holds.resident_bytes,
                distributed=e.spec.holds.distributed,
            ).peak_bytes

    @contextmanager
    def _training_run(self, forward: _Forward) -> Iterator[TrainingRun]:
        """Successive steps by a forward; all state is restored afterwards."""
        e = self.execution
        with (
            forward_set(e.spec.model, forward),
            preserve_state(e.spec.model, e.spec.sample_input, e.spec.loss_fn, "sgd"),
        ):
            yield TrainingRun(
                e.spec.model, e.spec.sample_input, e.spec.loss_fn, seed=e.seed, outputs=True
            )

    def _against(self, expected: Sequence[StepResults], forward: _Forward) -> StepVerdict:
        e = self.execution
        with self._training_run(forward) as run:
            pairs = ((one, run.step()) for one in expected)
            return judge_results(pairs, dtype=rounding_dtype(e.spec.model, e.device), seed=e.seed)

    def _bits(self, forward: _Forward) -> tuple[Bits, str]:
        """Compare with eager's bits or, if eager's own bits do not repeat, with its rounding."""
        if self._expected is None:
            return "not compared", ""
        verdict = self._against(self._expected, forward)
        if verdict.bits == "equal":
            return "equal", ""
        if self._noise.bits == "equal":
            self._noise = self._against(self._expected, self.own)
        if self._noise.bits not in ("equal", "right"):
            return "not repeatable", verdict.difference
        if verdict.bits != "right":
            return "WRONG", verdict.difference
        return "different" if self._noise.bits == "equal" else "not repeatable", verdict.difference

    def _times(self, forward: _Forward, *, beside: bool) -> tuple[list[float], list[float]]:
        """Microseconds of eager steps and of the others; only the others if not ``beside``."""
        if self.execution.repeats == 0:
            return [], []
        if beside:
            pairs = self._pairs(self.own, forward)
            return list(pairs.first_us), list(pairs.second_us)
        with self._timed_steps() as run:
            for _ in range(_WARMUP_PAIRS):
                run(forward)
            e = self.execution
            return [], [timed_us(lambda: run(forward), e.device) for _ in range(e.repeats)]

    def _pairs(self, first: _Forward, second: _Forward) -> PairedTiming:
        with self._timed_steps() as run:
            return measure_pair(
                lambda: run(first),
                lambda: run(second),
                repeats=self.execution.repeats,
                warmup=_WARMUP_PAIRS,
                device=self.execution.device,
            )

    @contextmanager
    def _timed_steps(self) -> Iterator[Callable[[_Forward], Any]]:
        """Yield a function that runs a whole step by a forward; state is restored afterwards."""
        e = self.execution
        step = make_step(
            e.spec.model,
            e.spec.sample_input,
            loss_fn=e.spec.loss_fn,
            optimizer=self.optimizer,
            seed=e.seed,
            holds=e.spec.holds,
        )

        def run(which: _Forward) -> Any:
            with forward_set(e.spec.model, which):
                return step()

        with preserve_state(e.spec.model, e.spec.sample_input, e.spec.loss_fn, self.optimizer):
            yield run


def measured_step(
    peak_bytes: int,
    times: tuple[Sequence[float], Sequence[float]],
    bits: Bits,
    difference: str,
) -> MeasuredStep:
    """Return the figures of measured steps.

    Parameters
    ----------
    times
        Microseconds of eager steps and of the others, pair by pair; the first is empty
        if the others ran alone.
    """
    eager_us, step_us = times
    ratios = [b / a for a, b in zip(eager_us, step_us, strict=True)] if eager_us else []
    return MeasuredStep(
        peak_bytes=peak_bytes,
        step_us=_median(step_us),
        eager_us=_median(eager_us),
        ratio=_median(ratios),
        quartiles=quartiles(ratios),
        num_pairs=len(ratios),
        bits=bits,
        difference=difference,
    )


def caught(
    execution: Execution, call: Callable[[], MeasuredStep]
) -> tuple[MeasuredStep | None, str]:
    """A call's figures, or why it failed; a failed call's tensors are then freed."""
    error = ""
    try:
        return call(), error
    # If one schedule cannot run, its row reports it, and the others still run.
    except Exception as failed:  # noqa: BLE001
        error = said(failed, "when it ran")
    clear_gradients(execution.spec.model, execution.spec.sample_input, execution.spec.loss_fn)
    gc.collect()
    if execution.device.type == "cuda":
        torch.cuda.empty_cache()
    return None, error


def outcome_of(error: Exception) -> RowOutcome:
    """The outcome of a row that ended in an error."""
    if isinstance(error, StrategyError):
        return RowOutcome(error.failure)
    return RowOutcome.OUT_OF_MEMORY if is_out_of_memory(error) else RowOutcome.FAILED


def said(error: Exception, when: str) -> str:
    """Return an error's text for a row."""
    what = "out of memory" if is_out_of_memory(error) else type(error).__name__
    return f"{what} {when}: {error}"[:LONGEST_ERROR]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
