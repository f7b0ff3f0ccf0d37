"""Decide whether steps of two models agree: bitwise, up to rounding, or not.

Compared is everything that a training loop continues with (see :mod:`.training_run`),
over two steps without seeding again, because a tool may be right in its first step only.

Each tensor is judged alone, so that a small tensor that is completely wrong is found
beside large ones that are right. Its error is the norm of the difference over its own
norm. If its own norm is less than a small share of the norm of all tensors of its kind,
that share is used instead: gradients that are zero except for rounding, such as that of
a key's bias in attention, have only rounding to compare. Tensors without floating-point
numbers must be the same.

If dropout draws other numbers than eager's, there is nothing to compare with. The
gradient is then compared with the model's own loss: the slope of the loss along the
gradient, by central differences from the same seed, must be the gradient's norm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

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
from ...measuring.bit_comparison import (
    Results,
    first_difference,
)
from .training_run import (
    StepResults,
    TrainingRun,
    loss_value,
)

Word = Literal["equal", "right", "WRONG", "other draws"]

_ORDER: tuple[Word, ...] = ("equal", "right", "other draws", "WRONG")
_LOSS_TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_TOLERANCE = {None: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_FLOOR = {None: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""The least norm that a tensor counts with, as a share of the norm of all of its kind.

Times the tolerance, this is the least error that counts: 1e-6 of that norm in float32 and
1e-3 under bfloat16. Gradients that are zero except for rounding reach 1e-7 and 3e-4, as
for a convolution's bias before batch norm.
"""
_LOSS_CHANGES = (1e-2, 2.5e-3)
"""Relative changes of the loss over which its slope is taken; the better one counts."""
SLOPE_TOLERANCE = 0.03
"""Tolerance of the slope by differences; rounding and curvature stay below it in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVerdict:
    """How steps differ from eager's.

    Parameters
    ----------
    bits
        ``"equal"`` (all to the last bit), ``"right"`` (to rounding), ``"WRONG"``, or
        ``"other draws"`` where the loss shows that dropout drew other numbers.
    difference
        The first thing that differs, in words; ``""`` if nothing does.
    loss_error, gradient_error, buffer_error
        Relative errors, the greatest of all steps that could be compared; the last two
        are those of the worst tensor.
    gradients, buffers
        ``bits`` of gradients alone and of buffers alone; the second is ``""`` if the
        model has none.
    slope_error
        Error of the gradient against its own loss, if draws differ; otherwise NaN.
    """

    bits: Word
    difference: str = ""
    loss_error: float = 0.0
    gradient_error: float = 0.0
    buffer_error: float = 0.0
    gradients: Word = "equal"
    buffers: Word | Literal[""] = ""
    slope_error: float = math.nan


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
        found.append(_compared(expected, actual, dtype, f"in step {i + 1} of seed {seed}"))
        if found[-1].bits in ("WRONG", "other draws"):
            break
    return _worst(found)


def rounding_dtype(model: nn.Module, device: torch.device) -> torch.dtype | None:
    """Return the coarsest dtype of a step; ``None`` for float32 and wider."""
    dtypes = {p.dtype for p in model.parameters()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)


def verdict_word(
    loss_error: float, error: float, dtype: torch.dtype | None, *, draws: bool = True
) -> Word:
    """Classify errors of a step by the rounding of a dtype.

    Parameters
    ----------
    loss_error, error
        Relative errors of the loss and of what is judged.
    dtype
        The dtype that rounds; ``None`` for float32 and wider.
    draws
        Whether the step draws random numbers: then another loss means other draws,
        otherwise a mistake.
    """
    if loss_error == error == 0:
        return "equal"
    if not loss_error <= _LOSS_TOLERANCE[dtype]:
        return "other draws" if draws else "WRONG"
    return "right" if error <= _TOLERANCE[dtype] else "WRONG"


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
        norm = math.sqrt(sum(_square(g) for _, g in gradients))
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


def _compared(
    expected: StepResults, actual: StepResults, dtype: torch.dtype | None, where: str
) -> StepVerdict:
    ours, theirs = expected.tensors, actual.tensors
    has_buffers = any(name.startswith("buffer ") for name in ours)
    first = first_difference(ours, theirs)
    if first is None:
        return StepVerdict(bits="equal", buffers="equal" if has_buffers else "")
    loss, other_loss = (_value(results["the loss"]) for results in (ours, theirs))
    same_loss = other_loss == loss or (math.isnan(other_loss) and math.isnan(loss))
    loss_error = 0.0 if same_loss else abs(other_loss - loss) / max(abs(loss), 1e-30)
    errors: list[float] = []
    words: list[Word] = []
    texts: list[str] = []
    for prefix in ("the gradient of ", "buffer ", "output "):
        # Unchanged buffers, such as a table of positions, do not tell the size of a step.
        sized = expected.changed_buffers if prefix == "buffer " else None
        error, name = _distance(ours, theirs, prefix, _FLOOR[dtype], sized)
        errors.append(error)
        words.append(verdict_word(loss_error, error, dtype, draws=expected.drew))
        texts.append(f"{name} is off" + (f" by {error:.3g} of its norm" if error < 1e9 else ""))
    bits = max((*words, "right"), key=_ORDER.index)
    if bits == "other draws":
        what = f"the loss is {other_loss:.6g} and eager's {loss:.6g}: other random numbers"
    elif bits == "WRONG" and max(errors) > 0:
        what = next(
            t for t, w, e in zip(texts, words, errors, strict=True) if w == "WRONG" and e > 0
        )
    elif bits == "WRONG":
        what = f"the loss is {other_loss:.6g} and eager's {loss:.6g}"
    else:
        what = f"{first} has other bits"
    return StepVerdict(
        bits=bits,
        difference=f"{what}, {where}",
        loss_error=loss_error,
        gradient_error=errors[0],
        buffer_error=errors[1],
        gradients=words[0],
        buffers=words[1] if has_buffers else "",
    )


def _worst(found: Sequence[StepVerdict]) -> StepVerdict:
    """One verdict of all steps."""
    worst = max(found, key=lambda v: _ORDER.index(v.bits))
    buffers: list[Word] = [v.buffers for v in found if v.buffers]
    return StepVerdict(
        bits=worst.bits,
        difference=worst.difference,
        loss_error=max(v.loss_error for v in found),
        gradient_error=max(v.gradient_error for v in found),
        buffer_error=max(v.buffer_error for v in found),
        gradients=max((v.gradients for v in found), key=_ORDER.index),
        buffers=max(buffers, key=_ORDER.index) if buffers else "",
    )


def _by_slope(verdict: StepVerdict, error: float) -> StepVerdict:
    right = error <= SLOPE_TOLERANCE
    word: Word = "other draws" if right else "WRONG"
    how = "the gradient is its own loss' slope" if right else "the gradient is not its loss' slope"
    return StepVerdict(
        bits=max((verdict.bits, word), key=_ORDER.index),
        difference=f"{verdict.difference}; {how} (off by {error:.2%})",
        loss_error=verdict.loss_error,
        gradient_error=verdict.gradient_error,
        buffer_error=verdict.buffer_error,
        gradients=word,
        buffers=verdict.buffers,
        slope_error=error,
    )


def _distance(
    expected: Results,
    actual: Results,
    prefix: str,
    floor: float,
    sized: Collection[str] | None = None,
) -> tuple[float, str]:
    """The greatest error of the tensors whose names start with ``prefix``, and that tensor's name.

    Norms cover only finite elements: a causal mask of -inf would make them NaN. If the
    other elements differ, the error is infinite. A tensor that is missing on one side
    counts as zeros.

    Parameters
    ----------
    floor
        The least norm that a tensor counts with, as a share of the norm of all of them.
    sized
        Names of the tensors whose norms add up to that; ``None`` for all.
    """
    sizes: dict[str, float] = {}
    differences: dict[str, float] = {}
    for name in dict.fromkeys((*expected, *actual)):
        if name.startswith(prefix):
            a, b = expected.get(name), actual.get(name)
            sizes[name] = 0.0 if a is None else _square(_finite(a))
            differences[name] = _square_of_difference(a, b)
    floats = [n for n in sizes if (t := expected.get(n)) is not None and _rounds(t)]
    total = sum(sizes[n] for n in floats if sized is None or n in sized)
    errors = {
        name: math.sqrt(difference / max(sizes[name], floor**2 * total, 1e-60))
        for name, difference in differences.items()
        if difference
    }
    most = max(errors, key=lambda name: errors[name], default="")
    return errors.get(most, 0.0), most


def _square_of_difference(a: Tensor | None, b: Tensor | None) -> float:
    """Over the finite elements; infinite if the other elements differ.

    Also infinite if two tensors without rounding (of whole numbers, for example) differ.
    """
    one = b if a is None else a
    if one is None:
        return 0.0
    a, b = (torch.zeros_like(one) if t is None else t for t in (a, b))
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return math.inf
    if not (_rounds(a) and _rounds(b)):
        return 0.0 if torch.equal(_wide(a), _wide(b)) else math.inf
    a, b = _wide(a), _wide(b)
    finite = a.isfinite() & b.isfinite()
    if finite.all():
        return _square(b - a)
    others, theirs = a[~finite], b[~finite]
    coincide = (others == theirs) | (others.isnan() & theirs.isnan())
    return _square(b[finite] - a[finite]) if coincide.all() else math.inf


def _rounds(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _finite(tensor: Tensor) -> Tensor:
    """The tensor with zeros for elements that are not finite."""
    return _wide(tensor).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, with real and imaginary parts side by side."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()


def _value(tensor: Tensor | None) -> float:
    return math.nan if tensor is None else tensor.item()
