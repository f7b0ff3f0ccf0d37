"""Run successive steps of one model, and record everything that each leaves.

Recorded is what a training loop continues with: the loss, all gradients, the buffers and
the state of the random generators; on request also the model's outputs. Between two
steps there is a small step down the gradient, and nothing is seeded again.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graph_capture.private_torch.modules import COMPILED_PREFIX
from graph_capture.recording.outputs import take_apart

from ...base.resident import single_device
from ...base.training_step import (
    LossFn,
    Sample,
    clear_gradients,
    differentiate,
    output_tensors,
    train_step,
)
from ...measuring.bit_comparison import (
    Results,
    same_bits,
)
from ...measuring.rounding import StepResults

_STEP = 1e-3
"""Learning rate of the update between two steps."""


class TrainingRun:
    """One model's successive steps, with their own random states.

    Parameters change from step to step; the caller restores them
    (:func:`planner.base.preserve_state.preserve_state` with the optimizer ``"sgd"``).

    Parameters
    ----------
    model, sample_input, loss_fn
        As for :func:`planner.base.training_step.train_step`.
    seed
        Given to ``torch.manual_seed`` before the first step.
    outputs
        Whether results include the model's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        sample_input: Sample,
        loss_fn: LossFn | None,
        *,
        seed: int,
        outputs: bool = False,
    ) -> None:
        self._model, self._sample_input, self._loss_fn = model, sample_input, loss_fn
        self._device = single_device(model, sample_input)
        self._outputs = outputs
        torch.manual_seed(seed)
        self._state = _random_state(self._device)
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._buffers = _copies(_buffers(model))

    def step(self) -> StepResults:
        """Run one step, then a small one down its gradient."""
        model, device = self._model, self._device
        _set_random_state(self._state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        clear_gradients(model, self._sample_input, self._loss_fn)
        output, loss = train_step(model, self._sample_input, self._loss_fn)
        found: Results = {"the loss": torch.tensor(loss_value(output, loss), dtype=torch.float64)}
        if self._outputs:
            template, tensors = take_apart(output)
            names = (f"output {n!r}" for n in template.names)
            found |= _copies(dict(zip(names, tensors, strict=True)))
            del tensors
        del output, loss
        parameters = {_plain(n): p for n, p in model.named_parameters()}
        found |= _copies({f"the gradient of {n}": p.grad for n, p in parameters.items()})
        for i, t in enumerate(output_tensors(self._sample_input)):
            if t.is_leaf and t.requires_grad:
                found |= _copies({f"the gradient of input {i}": t.grad})
        before, self._buffers = self._buffers, _copies(_buffers(model))
        found |= self._buffers
        earlier, self._state = self._state, _random_state(device)
        self._python, self._numpy = random.getstate(), np.random.get_state()
        found |= _copies({f"the random generator {i}": s for i, s in enumerate(self._state)})
        with torch.no_grad():
            for p in parameters.values():
                if p.grad is not None:
                    p.sub_(p.grad.to(p.dtype), alpha=_STEP)
        clear_gradients(model, self._sample_input, self._loss_fn)
        return StepResults(
            tensors=found,
            changed_buffers=frozenset(n for n, b in self._buffers.items() if _other(before, n, b)),
            drew=any(not torch.equal(a, b) for a, b in zip(earlier, self._state, strict=True)),
        )


def loss_value(output: Any, loss: Tensor | None) -> float:
    """The loss, or the sum of what is differentiated instead."""
    roots = (loss,) if loss is not None else differentiate(output).tensors
    return sum(t.detach().double().sum().item() for t in roots)


def _buffers(model: nn.Module) -> Results:
    return {f"buffer {_plain(n)}": b for n, b in model.named_buffers()}


def _copies(tensors: Results) -> Results:
    return {n: None if t is None else t.detach().to("cpu", copy=True) for n, t in tensors.items()}


def _other(before: Results, name: str, after: Tensor | None) -> bool:
    """Whether a tensor differs from the earlier one of this name."""
    earlier = before.get(name)
    return earlier is None or after is None or not same_bits(earlier, after)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _plain(name: str) -> str:
    return name.removeprefix(COMPILED_PREFIX)
