"""Decide whether two ways of running a step agree bitwise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graph_capture.recording.outputs import take_apart

from ..base.consuming import consuming
from ..base.preserve_state import preserve_state
from ..base.resident import single_device
from ..base.training_step import (
    LossFn,
    Sample,
    output_tensors,
    train_step,
)
from .validation import Bits

Results = dict[str, Tensor | None]


class Verdict(NamedTuple):
    """What came of comparing a planned step with the unplanned one.

    Parameters
    ----------
    bits
        See :class:`planner.measuring.validation.Validation`.
    difference
        The first difference in words; ``None`` without one.
    gradient_error, tolerance
        Where rounding may differ: the largest relative error of a gradient, and from which
        one it is wrong.
    """

    bits: Bits
    difference: str | None = None
    gradient_error: float | None = None
    tolerance: float | None = None


def compare_bits(expected: Callable[[], Results], actual: Callable[[], Results]) -> Verdict:
    """Return the verdict and the first difference.

    If the two differ, the first runs again. If it does not repeat itself (kernels on
    CUDA that add in any order), nothing can be said about the second.
    """
    first = expected()
    different = first_difference(first, actual())
    if different is None:
        return Verdict(bits="equal")
    unstable = first_difference(first, expected())
    if unstable is None:
        return Verdict(bits="different", difference=different)
    return Verdict(bits="not repeatable", difference=unstable)


def step_results(
    model: nn.Module,
    sample_input: Sample,
    loss_fn: LossFn | None,
    seed: int,
    *,
    accumulates: bool = False,
    num_calls: int = 1,
    consumes: bool = False,
) -> Results:
    """Return everything that a step without an optimizer leaves, copied to the CPU.

    The model, the inputs and the random generators are restored afterwards.

    Parameters
    ----------
    accumulates
        Whether the step is the second, whose gradients are added to those of the first.
    num_calls
        Of the model before the one backward pass.
    consumes
        Whether gradients are copied as they arrive, and freed.
    """
    device = single_device(model, sample_input)
    with preserve_state(model, sample_input, loss_fn, None):
        torch.manual_seed(seed)
        if accumulates:
            train_step(model, sample_input, loss_fn, num_calls=num_calls)
        arrived: dict[int, Tensor] = {}  # by the parameter

        def consume(parameter: Tensor) -> None:
            assert parameter.grad is not None
            arrived[id(parameter)] = parameter.grad.to("cpu", copy=True)

        with consuming(model, consume) if consumes else nullcontext():
            output, loss = train_step(model, sample_input, loss_fn, num_calls=num_calls)
        template, outputs = take_apart(output)
        found: Results = {"the loss": loss}
        found |= {f"output {n!r}": t for n, t in zip(template.names, outputs, strict=True)}
        found |= {
            f"the gradient of {name}": arrived.get(id(p), p.grad)
            for name, p in model.named_parameters()
        }
        for i, t in enumerate(output_tensors(sample_input)):
            if t.is_leaf and t.requires_grad:
                found[f"the gradient of input {i}"] = t.grad
        found |= {f"buffer {name}": t for name, t in model.named_buffers()}
        found["the random generator"] = (
            torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        )
        return {
            name: None if t is None else t.detach().to("cpu", copy=True)
            for name, t in found.items()
        }


def first_difference(expected: Results, actual: Results) -> str | None:
    """Return the name of the first value that is missing or differs in one of the two."""
    for name in dict.fromkeys((*expected, *actual)):
        a, b = expected.get(name), actual.get(name)
        if (a is None) != (b is None):
            return name
        if a is not None and b is not None and not same_bits(a, b):
            return name
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shape, dtype and every bit are equal."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)
