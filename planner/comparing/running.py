"""Real steps of a comparison: eager ones, and those of a plan beside them in turn.

Peaks are recorded by :func:`planner.measure`, times taken in turn with eager's
(``measure_pair``), and everything that a step leaves is held against eager's to the
last bit.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..application import PlannedForward, capture_for, forward_set
from ..measuring.bit_comparison import Results, first_difference, step_results
from ..measuring.measure import measure, measure_pair, timed_us
from ..measuring.resident import single_device
from ..measuring.restored import restored
from ..out_of_memory import is_out_of_memory
from ..plan import Plan
from ..training_step import LossFn, Sample, build_optimizer, clear_gradients, make_step
from .comparison import Bits, MeasuredStep

LONGEST_ERROR = 600
"""Characters of an error that a row keeps."""

_WARMUP_PAIRS = 2

_Forward = Callable[..., Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What real steps run on; see :func:`planner.compare`."""

    model: nn.Module
    sample_input: Sample
    loss_fn: LossFn | None
    optimizer: torch.optim.Optimizer | str | None
    repeats: int
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return single_device(self.model, self.sample_input)


class Runner:
    """Runs steps on a model whose state its caller gives back afterwards.

    Parameters
    ----------
    arguments
        Of the call, by name.
    own
        The model's own forward, ``None`` for its class'.
    """

    def __init__(self, execution: Execution, arguments: Mapping[str, Any], own: _Forward) -> None:
        self.execution = execution
        self.arguments = arguments
        self.own = own
        optimizer = execution.optimizer
        if isinstance(optimizer, str):
            optimizer = build_optimizer(optimizer, execution.model.parameters())
        self.optimizer = optimizer
        self._expected: Results | None = None

    def eager(self) -> MeasuredStep:
        """Eager steps beside eager steps: what the machine's noise is, and whether bits repeat."""
        self._expected = None
        peak_bytes = self._peak_bytes(self.own)
        expected = self._results(self.own)
        different = first_difference(expected, self._results(self.own))
        self._expected = expected
        return self._measured(
            peak_bytes,
            self._times(self.own, beside=True),
            "equal" if different is None else "not repeatable",
            different,
        )

    def planned(self, plan: Plan) -> MeasuredStep:
        """Steps by a plan, beside eager steps where those could run."""
        model = self.execution.model
        forward = PlannedForward(model, plan, capture_for(plan, model, model.forward), "error")
        forward.check(self.arguments)
        bits, different = self._bits(forward)
        peak_bytes = self._peak_bytes(forward)
        times = self._times(forward, beside=self._expected is not None)
        return self._measured(peak_bytes, times, bits, different)

    def _peak_bytes(self, forward: _Forward) -> int:
        e = self.execution
        with forward_set(e.model, forward):
            return measure(
                e.model,
                e.sample_input,
                loss_fn=e.loss_fn,
                optimizer=self.optimizer,
                repeats=0,
                seed=e.seed,
            ).peak_bytes

    def _results(self, forward: _Forward) -> Results:
        e = self.execution
        with forward_set(e.model, forward):
            return step_results(e.model, e.sample_input, e.loss_fn, e.seed)

    def _bits(self, forward: _Forward) -> tuple[Bits, str | None]:
        if self._expected is None:
            return "not compared", None
        different = first_difference(self._expected, self._results(forward))
        if different is None:
            return "equal", None
        unstable = first_difference(self._expected, self._results(self.own))
        return ("different", different) if unstable is None else ("not repeatable", unstable)

    def _times(self, forward: _Forward, *, beside: bool) -> tuple[list[float], list[float]]:
        """Microseconds of eager steps and of the others; of those alone where not ``beside``."""
        e = self.execution
        step = make_step(
            e.model, e.sample_input, loss_fn=e.loss_fn, optimizer=self.optimizer, seed=e.seed
        )

        def run(which: _Forward) -> Any:
            with forward_set(e.model, which):
                return step()

        if e.repeats == 0:
            return [], []
        # The optimizer has stepped when this ends: the next schedule begins where this one did.
        with restored(e.model, e.sample_input, e.loss_fn, self.optimizer):
            if not beside:
                for _ in range(_WARMUP_PAIRS):
                    run(forward)
                return [], [timed_us(lambda: run(forward), e.device) for _ in range(e.repeats)]
            pairs = measure_pair(
                lambda: run(self.own),
                lambda: run(forward),
                repeats=e.repeats,
                warmup=_WARMUP_PAIRS,
                device=e.device,
            )
        return list(pairs.first_us), list(pairs.second_us)

    def _measured(
        self,
        peak_bytes: int,
        times: tuple[list[float], list[float]],
        bits: Bits,
        different: str | None,
    ) -> MeasuredStep:
        eager_us, step_us = times
        ratios = [b / a for a, b in zip(eager_us, step_us, strict=True)] if eager_us else []
        return MeasuredStep(
            peak_bytes=peak_bytes,
            step_us=_median(step_us),
            eager_us=_median(eager_us),
            ratio=_median(ratios),
            quartiles=_quartiles(ratios),
            num_pairs=len(ratios),
            bits=bits,
            difference=different or "",
        )


def caught(
    execution: Execution, call: Callable[[], MeasuredStep]
) -> tuple[MeasuredStep | None, str]:
    """What a call found, or why it could not; what it left on the device is dropped then."""
    error = ""
    try:
        return call(), error
    # One schedule that cannot run is told in its row, and the others still run.
    except Exception as failed:  # noqa: BLE001
        error = said(failed, "when it ran")
    clear_gradients(execution.model, execution.sample_input, execution.loss_fn)
    gc.collect()
    if execution.device.type == "cuda":
        torch.cuda.empty_cache()
    return None, error


def said(error: Exception, when: str) -> str:
    """An error in the words of a row."""
    what = "out of memory" if is_out_of_memory(error) else type(error).__name__
    return f"{what} {when}: {error}"[:LONGEST_ERROR]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _quartiles(ratios: Sequence[float]) -> tuple[float, float]:
    if len(ratios) < 2:
        return _median(ratios), _median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high
