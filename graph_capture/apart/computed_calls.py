"""Compute what calls that stand for themselves return, in a step that runs for real.

Values decide what else such a step does, so the modules must return their own. Forward
runs without gradients, so that nothing is saved inside. Backward runs the module's forward
again, from the same generator state and under the same autocast, and differentiates it:
hooks and functions that look at gradients then see those of a real step. Zeros would take
no time, but other ways through such code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calls.autocast import AutocastState
from ..calls.call_spec import call_forward, tensors_of
from ..private_torch.trees import tree_map
from ..reads.isolation import generator_states, generators_put_back, set_generator_states
from ..recording.outputs import take_apart
from .call_values import CallValues
from .opaque_calls import BACKWARD, FORWARD, Forward, SeenCall
from .opaque_form import Form, fresh_tensors
from .real_calls import RealCalls


@dataclass(frozen=True, kw_only=True)
class _Called:
    """A call that was made in forward."""

    call: SeenCall
    forward: Forward
    arguments: Mapping[str, Any]
    autocast: AutocastState
    generators: tuple[np.ndarray, ...]


class Computing:
    """Makes outputs and gradients by running the module, apart from what is written down.

    Parameters
    ----------
    calls
        Writes down the step.
    model
        The model that the modules are in.
    torch_type
        The device type whose autocast counts.
    """

    def __init__(self, calls: RealCalls, model: nn.Module, torch_type: str) -> None:
        self._calls = calls
        self._model = model
        self._torch_type = torch_type
        self._open: dict[int, _Called] = {}  # until their backward

    def values_of(self, arguments: Mapping[str, Any]) -> CallValues:
        """See :class:`~.opaque_calls.Making`."""
        return CallValues(
            arguments=tree_map(_apart, dict(arguments)),
            computed=frozenset(
                i for i, t in enumerate(tensors_of(arguments)) if self._calls.is_computed(t)
            ),
            generators=generator_states(),
        )

    def called(self, call: SeenCall, forward: Forward, arguments: Mapping[str, Any]) -> None:
        """See :class:`~.opaque_calls.Making`."""
        with self._calls.apart():
            generators = generator_states()
        self._open[call.number] = _Called(
            call=call,
            forward=forward,
            arguments=arguments,
            autocast=AutocastState.of(self._torch_type),
            generators=generators,
        )

    def outputs(self, number: int, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See :class:`~.opaque_calls.Making`."""
        called = self._open[number]
        form = called.call.form.outputs
        with self._calls.apart(), torch.no_grad():
            _, tensors = take_apart(call_forward(called.forward, called.arguments))
            made = _filled(form, tensors)
            del tensors
        self._calls.stands(FORWARD, number, given, made, called.call.path)
        return made

    def gradients(
        self, number: int, tangents: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """See :class:`~.opaque_calls.Making`."""
        called = self._open.pop(number)
        with self._calls.apart():
            made = self._computed(called, tangents)
        self._calls.stands(BACKWARD, number, [*tangents, *given], made, called.call.path)
        return made

    def forget(self) -> None:
        """Let go of calls whose backward never came."""
        self._open.clear()

    def _computed(self, called: _Called, tangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        form = called.call.form
        module = self._model.get_submodule(called.call.path)
        arguments = tree_map(_apart, dict(called.arguments))
        given = tensors_of(arguments)
        with (
            generators_put_back(),
            called.autocast.holding(),
            torch.enable_grad(),
        ):
            set_generator_states(called.generators)
            _, tensors = take_apart(call_forward(called.forward, arguments))
        leaves = [
            given[leaf] if isinstance(leaf, int) else module.get_parameter(leaf)
            for leaf in form.leaves
        ]
        found = torch.autograd.grad(
            [tensors[i] for i in form.differentiated],
            leaves,
            [t.contiguous() for t in tangents],
            allow_unused=True,
        )
        return _filled(form.gradients, found)


def _apart(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _filled(form: Form, values: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The tensors that a form says are made, with these values."""
    made = fresh_tensors(form)
    wanted = (v for tensor, v in zip(form, values, strict=True) if tensor.given is None)
    with torch.no_grad():
        for tensor, value in zip(made, wanted, strict=True):
            if value is None:
                tensor.zero_()
            else:
                _dense(tensor).copy_(_dense(value, like=tensor))
    return made


def _dense(value: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """A view without the repetitions of ``expand``."""
    for dim, stride in enumerate((value if like is None else like).stride()):
        if stride == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value
