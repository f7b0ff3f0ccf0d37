"""Judge what two steps left: equal to the last bit, equal up to rounding, or not.

Each tensor is judged alone, so that a small tensor that is completely wrong is found
beside large ones that are right. Its error is the norm of the difference over its own
norm. If its own norm is less than a small share of the norm of all tensors of its kind,
that share is used instead: gradients that are zero except for rounding, such as that of
a key's bias in attention, have only rounding to compare. Tensors without floating-point
numbers must be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .bit_comparison import Results, Verdict, first_difference, same_bits
from .validation import Bits

Word = Literal["equal", "right", "WRONG", "other draws"]

ORDER: tuple[Word, ...] = ("equal", "right", "other draws", "WRONG")
_LOSS_TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
TOLERANCE = {None: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_FLOOR = {None: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""The least norm that a tensor counts with, as a share of the norm of all of its kind.

Times the tolerance, this is the least error that counts: 1e-6 of that norm in float32 and
1e-3 under bfloat16. Gradients that are zero except for rounding reach 1e-7 and 3e-4, as
for a convolution's bias before batch norm.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResults:
    """The results of one step, copied to the CPU.

    Parameters
    ----------
    tensors
        By name: ``"the loss"``, ``"the gradient of …"``, ``"buffer …"``,
        ``"the random generator …"``, ``"output …"``.
    changed_buffers
        Names of the buffers that the step changed.
    drew
        Whether it drew random numbers.
    """

    tensors: Results
    changed_buffers: frozenset[str]
    drew: bool


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
    return "right" if error <= TOLERANCE[dtype] else "WRONG"


def judged(
    expected: StepResults, actual: StepResults, dtype: torch.dtype | None, where: str = ""
) -> StepVerdict:
    """Compare what one step left with what eager's step left.

    Parameters
    ----------
    dtype
        The dtype that rounds, see :func:`rounding_dtype`.
    where
        Which step it was, for the verdict's words.
    """
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
    bits = max((*words, "right"), key=ORDER.index)
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
        difference=f"{what}, {where}" if where else what,
        loss_error=loss_error,
        gradient_error=errors[0],
        buffer_error=errors[1],
        gradients=words[0],
        buffers=words[1] if has_buffers else "",
    )


def compare_rounded(
    model: nn.Module,
    device: torch.device,
    expected: Callable[[], Results],
    actual: Callable[[], Results],
) -> Verdict:
    """Return the verdict on a step whose kernels round otherwise, but which draws the same numbers.

    The random generator must be in the same state to the last bit. If the two differ by more
    than rounding, the first runs again, as in :func:`~.bit_comparison.compare_bits`.

    Parameters
    ----------
    model, device
        Of the step, as it is before it.
    expected, actual
        Run the step, and leave the model as it was.
    """
    dtype = rounding_dtype(model, device)
    before: Results = {f"buffer {n}": b.detach().cpu() for n, b in model.named_buffers()}
    first = expected()
    changed = {n for n, b in before.items() if b is None or not _same(b, first.get(n))}
    sized = StepResults(tensors=first, changed_buffers=frozenset(changed), drew=False)

    def found_beside(other: Results) -> StepVerdict:
        return judged(
            sized, StepResults(tensors=other, changed_buffers=frozenset(), drew=False), dtype
        )

    second = actual()
    verdict = found_beside(second)
    state = "the random generator"
    bits, difference = verdict.bits, verdict.difference
    if not _same(first[state], second.get(state)):
        bits, difference = "WRONG", f"{state} ends in another state"
    if bits == "WRONG" and (unstable := found_beside(expected())).bits == "WRONG":
        return Verdict("not repeatable", unstable.difference)
    word: Bits = "equal" if bits == "equal" else "right" if bits == "right" else "WRONG"
    return Verdict(word, difference or None, verdict.gradient_error, TOLERANCE[dtype])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and same_bits(a, b)


def largest_error(
    pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype | None = None
) -> float:
    """The largest error of tensors of one kind, each found beside what was expected; NaN or
    infinite where numbers are.

    Parameters
    ----------
    dtype
        The dtype that rounds, see :func:`rounding_dtype`.
    """
    total = torch.stack([expected.norm() for _, expected in pairs]).norm()
    floor = _FLOOR[dtype] * total
    errors = [(a - b).norm() / torch.maximum(b.norm(), floor) for a, b in pairs]
    return float(torch.stack(errors).max())


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
            sizes[name] = 0.0 if a is None else squared_norm(_finite(a))
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
        return squared_norm(b - a)
    others, theirs = a[~finite], b[~finite]
    coincide = (others == theirs) | (others.isnan() & theirs.isnan())
    return squared_norm(b[finite] - a[finite]) if coincide.all() else math.inf


def _rounds(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _finite(tensor: Tensor) -> Tensor:
    """The tensor with zeros for elements that are not finite."""
    return _wide(tensor).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, with real and imaginary parts side by side."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def squared_norm(tensor: Tensor) -> float:
    """The square of a tensor's norm, summed in float64."""
    return tensor.double().square().sum().item()


def _value(tensor: Tensor | None) -> float:
    return math.nan if tensor is None else tensor.item()


__all__ = [
    "ORDER",
    "TOLERANCE",
    "StepResults",
    "StepVerdict",
    "Word",
    "compare_rounded",
    "judged",
    "largest_error",
    "rounding_dtype",
    "squared_norm",
    "verdict_word",
]
