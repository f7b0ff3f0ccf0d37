"""Whether steps of two models come out the same: to the last bit, to rounding, or not.

What is compared is what a training loop goes on with: the loss, all gradients, the
buffers and the state of the random generators. Two steps run one after another
without seeding again, with a small step down the gradient between, from several
seeds: a tool may be right in its first step only.

Where dropout draws other numbers than eager's there is nothing to compare with. The
gradient is then held against the model's own loss: its slope along the gradient, by
central differences from the same seed, must be the gradient's norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..measuring.bit_comparison import Results, first_difference
from ..measuring.resident import single_device
from ..measuring.restored import restored
from ..training_step import (
    LossFn,
    Sample,
    call_model,
    clear_gradients,
    differentiate,
    output_tensors,
    train_step,
)

Word = Literal["equal", "right", "WRONG", "other draws"]

_ORDER: tuple[Word, ...] = ("equal", "right", "other draws", "WRONG")
_LOSS_TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_TOLERANCE = {None: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_STEP = 1e-3
"""Learning rate of the step between two steps."""
_LOSS_CHANGES = (1e-2, 2.5e-3)
"""Relative changes of the loss for which its slope is taken; the better one counts."""
SLOPE_TOLERANCE = 0.03
"""Of the slope by differences: rounding and curvature stay below, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVerdict:
    """How steps differ from eager's.

    Parameters
    ----------
    bits
        ``"equal"`` (all to the last bit), ``"right"`` (to rounding), ``"WRONG"``, or
        ``"other draws"`` where the loss shows that dropout drew other numbers.
    difference
        The first thing that is not the same, in words; ``""`` if nothing is.
    loss_error, gradient_error, buffer_error
        Relative, the greatest of all steps that could be compared; the last two
        by the norm of all tensors together.
    gradients, buffers
        ``bits`` of gradients and of buffers alone; the second is ``""`` where the
        model has none.
    slope_error
        Of the gradient against its own loss, where draws differ; NaN elsewhere.
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

    Parameters, buffers, gradients, inputs and random generators are afterwards as
    before. Gradients of one model at a time lie on the device. Under autocast, call
    this under it.

    Parameters
    ----------
    eager, other
        Of equal weights and buffers; names may differ by ``torch.compile``'s prefix.
    sample_input, loss_fn
        As :func:`planner.training_step.train_step` takes them.
    seeds, num_steps
        From each seed so many steps run, until one is wrong or draws other numbers.
    """
    device = single_device(eager, sample_input)
    dtype = _rounding(eager, device)
    found: list[StepVerdict] = []
    for seed in seeds:
        with (
            restored(eager, sample_input, loss_fn, "sgd"),
            restored(other, sample_input, loss_fn, "sgd"),
        ):
            lanes = [_Lane(m, sample_input, loss_fn, device, seed) for m in (eager, other)]
            for step in range(num_steps):
                (expected, drew), (actual, _) = (lane.step() for lane in lanes)
                where = f"in step {step + 1} of seed {seed}"
                found.append(_compared(expected, actual, drew, dtype, where))
                if found[-1].bits in ("WRONG", "other draws"):
                    break
    verdict = _worst(found)
    if verdict.bits != "other draws" or dtype is not None:
        return verdict
    return _by_slope(verdict, slope_error(other, sample_input, loss_fn=loss_fn, seed=seeds[0]))


def verdict_word(
    loss_error: float, error: float, dtype: torch.dtype | None, *, draws: bool = True
) -> Word:
    """What errors of a step mean, by the rounding of a dtype.

    Parameters
    ----------
    loss_error, error
        Relative, of the loss and of what is judged.
    dtype
        The dtype that rounds; ``None`` for float32 and wider.
    draws
        Whether the step draws random numbers: another loss is then other draws,
        and else a mistake.
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
    numbers. Everything is afterwards as before. Tensors whose gradients are small
    beside the others' weigh little, so that a mistake in them alone is not seen.
    """
    with restored(model, sample_input, loss_fn, "sgd"):
        torch.manual_seed(seed)
        output, loss = train_step(model, sample_input, loss_fn)
        value = abs(_scalar(output, loss))
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


# -- one step of one model ---------------------------------------------------------


class _Lane:
    """One model's own succession of steps, with a random state of its own."""

    def __init__(
        self,
        model: nn.Module,
        sample_input: Sample,
        loss_fn: LossFn | None,
        device: torch.device,
        seed: int,
    ) -> None:
        self.model, self.sample_input, self.loss_fn = model, sample_input, loss_fn
        self.device = device
        torch.manual_seed(seed)
        self.state = _random_state(device)

    def step(self) -> tuple[Results, bool]:
        """What a step leaves, copied to the CPU, and whether it drew random numbers."""
        _set_random_state(self.state, self.device)
        clear_gradients(self.model, self.sample_input, self.loss_fn)
        output, loss = train_step(self.model, self.sample_input, self.loss_fn)
        found: Results = {"the loss": torch.tensor(_scalar(output, loss), dtype=torch.float64)}
        del output, loss
        parameters = {_plain(n): p for n, p in self.model.named_parameters()}
        found |= {f"the gradient of {n}": p.grad for n, p in parameters.items()}
        for i, t in enumerate(output_tensors(self.sample_input)):
            if t.is_leaf and t.requires_grad:
                found[f"the gradient of input {i}"] = t.grad
        found |= {f"buffer {_plain(n)}": b for n, b in self.model.named_buffers()}
        before, self.state = self.state, _random_state(self.device)
        found |= {f"the random generator {i}": state for i, state in enumerate(self.state)}
        copies = {
            n: None if t is None else t.detach().to("cpu", copy=True) for n, t in found.items()
        }
        with torch.no_grad():
            for p in parameters.values():
                if p.grad is not None:
                    p.sub_(p.grad.to(p.dtype), alpha=_STEP)
        clear_gradients(self.model, self.sample_input, self.loss_fn)
        drew = any(not torch.equal(a, b) for a, b in zip(before, self.state, strict=True))
        return copies, drew


def _compared(
    expected: Results, actual: Results, drew: bool, dtype: torch.dtype | None, where: str
) -> StepVerdict:
    has_buffers = any(name.startswith("buffer ") for name in expected)
    first = first_difference(expected, actual)
    if first is None:
        return StepVerdict(bits="equal", buffers="equal" if has_buffers else "")
    loss, theirs = (_value(results["the loss"]) for results in (expected, actual))
    same_loss = theirs == loss or (math.isnan(theirs) and math.isnan(loss))
    loss_error = 0.0 if same_loss else abs(theirs - loss) / max(abs(loss), 1e-30)
    gradient_error, gradient = _distance(expected, actual, "the gradient of ")
    buffer_error, buffer = _distance(expected, actual, "buffer ")
    gradients = verdict_word(loss_error, gradient_error, dtype, draws=drew)
    buffers = verdict_word(loss_error, buffer_error, dtype, draws=drew)
    bits = max((gradients, buffers, "right"), key=_ORDER.index)
    if bits == "WRONG" and gradients == "WRONG":
        what = f"all gradients together are off by {gradient_error:.3g} of their norm ({gradient})"
    elif bits == "WRONG":
        what = f"{buffer} is off: all buffers together by {buffer_error:.3g} of their norm"
    elif bits == "other draws":
        what = f"the loss is {theirs:.6g} and eager's {loss:.6g}: other random numbers"
    else:
        what = f"{first} has other bits"
    return StepVerdict(
        bits=bits,
        difference=f"{what}, {where}",
        loss_error=loss_error,
        gradient_error=gradient_error,
        buffer_error=buffer_error,
        gradients=gradients,
        buffers=buffers if has_buffers else "",
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


def _distance(expected: Results, actual: Results, prefix: str) -> tuple[float, str]:
    """Norm of the difference over the norm of what is expected, and what differs most.

    Both norms are of the finite places: a causal mask of -inf would make them NaN.
    Infinite where the others do not coincide. A tensor that is missing on one side
    counts as zeros.
    """
    differences: dict[str, float] = {}
    size = 0.0
    for name in dict.fromkeys((*expected, *actual)):
        if not name.startswith(prefix):
            continue
        a, b = expected.get(name), actual.get(name)
        size += 0.0 if a is None else _square(_wide(a).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        differences[name] = _square_of_difference(a, b)
    total = sum(differences.values())
    if total == 0:
        return 0.0, ""
    most = max(differences, key=lambda name: differences[name])
    return math.sqrt(total / max(size, 1e-30)), most


def _square_of_difference(a: Tensor | None, b: Tensor | None) -> float:
    """Of the finite places; infinite where the others are not the same in both."""
    one = b if a is None else a
    if one is None:
        return 0.0
    a, b = (torch.zeros_like(one) if t is None else t for t in (a, b))
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return math.inf
    a, b = _wide(a), _wide(b)
    finite = a.isfinite() & b.isfinite()
    if finite.all():
        return _square(b - a)
    others, theirs = a[~finite], b[~finite]
    coincide = (others == theirs) | (others.isnan() & theirs.isnan())
    return _square(b[finite] - a[finite]) if coincide.all() else math.inf


def _wide(tensor: Tensor) -> Tensor:
    """In float64, with real and imaginary parts side by side."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()


def _value(tensor: Tensor | None) -> float:
    return math.nan if tensor is None else tensor.item()


def _scalar(output: Any, loss: Tensor | None) -> float:
    """The loss, or what is differentiated in its place, added up."""
    roots = (loss,) if loss is not None else differentiate(output).tensors
    return sum(t.detach().double().sum().item() for t in roots)


def _rounding(model: nn.Module, device: torch.device) -> torch.dtype | None:
    """The dtype that rounds most in a step; ``None`` for float32 and wider."""
    dtypes = {p.dtype for p in model.parameters()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _plain(name: str) -> str:
    return name.removeprefix("_orig_mod.")
