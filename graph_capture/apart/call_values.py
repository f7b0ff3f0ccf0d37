"""The real values of a module's call inside a step, for what its own code asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calls.call_spec import tensors_of
from ..reads.isolation import generators_put_back, set_generator_states
from ..tracing.traced_step import TracedStep
from ..values.checks import OutcomeChanged, is_check
from ..values.sample_values import SampleValues, UnknowableError


@dataclass(frozen=True, slots=True, kw_only=True)
class CallValues:
    """A call of a module as a real step has made it.

    Parameters
    ----------
    arguments
        Of its forward, by name; tensors without the history that led to them.
    computed
        The tensors of the call, by index, that parameters or random numbers contribute to.
    generators
        The generators' states when the call was made.
    """

    arguments: Mapping[str, Any]
    computed: frozenset[int]
    generators: tuple[np.ndarray, ...]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While active, the call's own random numbers are drawn; generators are put back."""
        with generators_put_back():
            set_generator_states(self.generators)
            yield


def takes_same_way(step: TracedStep, module: nn.Module, values: CallValues) -> bool:
    """Whether a call finds the answers that a captured step is made for.

    Parameters
    ----------
    step
        Of a module like this one.
    module
        The module that is called.
    values
        Its call.
    """
    checks = [node for node in step.graph.nodes if is_check(node.target)]
    if not checks:
        return True
    given = tensors_of(values.arguments)
    with values.drawing():
        known = SampleValues(step.graph, step.constants)
        for node in step.graph.find_nodes(op="placeholder"):
            role, target = node.meta["role"], str(node.meta["target"])
            if role == "input":
                known.give(node, given[int(target)])
            elif role in ("parameter", "buffer", "attribute"):
                known.give(node, _at(module, target))
        try:
            known.run_through(checks[-1])
        except (OutcomeChanged, UnknowableError):
            return False
    return True


def _at(module: nn.Module, target: str) -> torch.Tensor:
    path, _, name = target.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), name)
    return found
