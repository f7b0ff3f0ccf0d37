"""Decide whether steps of two models agree: bitwise, up to rounding, or not.

Compared is everything that a training loop continues with (see :mod:`.training_run`),
over two steps without seeding again, because a tool may be right in its first step only.

How far two steps' results are apart is judged by :mod:`planner.measuring.rounding`.

If dropout draws other numbers than eager's, there is nothing to compare with. The
gradient is then compared with the model's own loss: the slope of the loss along the
gradient, by central differences from the same seed, must be the gradient's norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ...base.preserve_state import preserve_state
from ...base.resident import single_device
from ...base.training_step import (
    LossFn,
    Sample,
    call_model,
    clear_gradients,
    differentiate,
    train_step,
)
from ...measuring.rounding import (
    ORDER,
    StepResults,
    StepVerdict,
    Word,
    judged,
    rounding_dtype,
    squared_norm,
)
from .training_run import (
    TrainingRun,
    loss_value,
)

_LOSS_CHANGES = (1e-2, 2.5e-3)
"""Relative changes of the loss over which its slope is taken; the better one counts."""
SLOPE_TOLERANCE = 0.03
"""Tolerance of the slope by differences; rounding and curvature stay below it in float32."""


def judge_steps(
    eager: nn.Module,
    other: nn.Module,
    sample_input: Sample,
    *,
    loss_fn: LossFn | None = None,
    seeds: Sequence[int] = (0, 1),
    num_steps: int = 2,
) -> StepVerdict:
    """Run steps of both models and compare what they leave.

    Parameters, buffers, gradients, inputs and random generators are restored afterwards.
    Gradients of only one model at a time lie on the device. Under autocast, call this
    under it.

    Parameters
    ----------
    eager, other
        Models with equal weights and buffers; names may differ by ``torch.compile``'s
        prefix.
    sample_input, loss_fn
        As for :func:`planner.base.training_step.train_step`.
    seeds, num_steps
        From each seed, this many steps run, until one is wrong or draws other numbers.
    """
    dtype = rounding_dtype(eager, single_device(eager, sample_input))
    found: list[StepVerdict] = []
    for seed in seeds:
        with (
            preserve_state(eager, sample_input, loss_fn, "sgd"),
            preserve_state(other, sample_input, loss_fn, "sgd"),
        ):
            first, second = (
                TrainingRun(m, sample_input, loss_fn, seed=seed) for m in (eager, other)
            )
            pairs = ((first.step(), second.step()) for _ in range(num_steps))
            found.append(judge_results(pairs, dtype=dtype, seed=seed))
    verdict = _worst(found)
    if verdict.bits != "other draws" or dtype is not None:
        return verdict
    return _by_slope(verdict, slope_error(other, sample_input, loss_fn=loss_fn, seed=seeds[0]))


def judge_results(
    pairs: Iterable[tuple[StepResults, StepResults]], *, dtype: torch.dtype | None, seed: int
) -> StepVerdict:
    """Compare what successive steps left, until one is wrong or draws other numbers.

    Parameters
    ----------
    pairs
        For each step, the results of eager and those of the other; taken one by one.
    dtype
        The dtype that rounds, see :func:`rounding_dtype`.
    seed
        The seed of the steps, for the verdict's words.
    """
    found: list[StepVerdict] = []
    for i, (expected, actual) in enumerate(pairs):
        found.append(judged(expected, actual, dtype, f"in step {i + 1} of seed {seed}"))
        if found[-1].bits in ("WRONG", "other draws"):
            break
    return _worst(found)


def slope_error(
    model: nn.Module, sample_input: Sample, *, loss_fn: LossFn | None = None, seed: int = 0
) -> float:
    """Relative error of a model's gradient along itself, against differences of its own loss.

    The loss is taken from the same seed each time, so that dropout draws the same
    numbers. All state is restored afterwards. Tensors with gradients that are small
    compared with others weigh little, so a mistake in them alone is not detected.
    """
    with preserve_state(model, sample_input, loss_fn, "sgd"):
        torch.manual_seed(seed)
        output, loss = train_step(model, sample_input, loss_fn)
        value = abs(loss_value(output, loss))
        gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(squared_norm(g) for _, g in gradients))
        clear_gradients(model, sample_input, loss_fn)
        if norm == 0 or not math.isfinite(norm):
            return math.nan

        def loss_at(distance: float) -> float:
            with torch.no_grad():
                for p, g in gradients:
                    p.add_(g.to(p.dtype), alpha=distance / norm)
            torch.manual_seed(seed)
            roots = differentiate(call_model(model, sample_input), loss_fn).tensors
            with torch.no_grad():
                result = sum(t.double().sum().item() for t in roots)
                for p, g in gradients:
                    p.sub_(g.to(p.dtype), alpha=distance / norm)
            return result

        errors = []
        for change in _LOSS_CHANGES:
            distance = change * max(value, 1e-3) / norm
            slope = (loss_at(distance) - loss_at(-distance)) / (2 * distance)
            errors.append(abs(slope / norm - 1))
        return min(errors)


# -- one verdict ------------------------------------------------------------------


def _worst(found: Sequence[StepVerdict]) -> StepVerdict:
    """One verdict of all steps."""
    worst = max(found, key=lambda v: ORDER.index(v.bits))
    buffers: list[Word] = [v.buffers for v in found if v.buffers]
    return StepVerdict(
        bits=worst.bits,
        difference=worst.difference,
        loss_error=max(v.loss_error for v in found),
        gradient_error=max(v.gradient_error for v in found),
        buffer_error=max(v.buffer_error for v in found),
        gradients=max((v.gradients for v in found), key=ORDER.index),
        buffers=max(buffers, key=ORDER.index) if buffers else "",
    )


def _by_slope(verdict: StepVerdict, error: float) -> StepVerdict:
    right = error <= SLOPE_TOLERANCE
    word: Word = "other draws" if right else "WRONG"
    how = "the gradient is its own loss' slope" if right else "the gradient is not its loss' slope"
    return StepVerdict(
        bits=max((verdict.bits, word), key=ORDER.index),
        difference=f"{verdict.difference}; {how} (off by {error:.2%})",
        loss_error=verdict.loss_error,
        gradient_error=verdict.gradient_error,
        buffer_error=verdict.buffer_error,
        gradients=word,
        buffers=verdict.buffers,
        slope_error=error,
    )
