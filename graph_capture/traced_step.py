"""The result of tracing: one training step as a torch.fx graph, with its properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.fx import Graph, Node

from .before_checks import BeforeChecks, before_checks
from .checks import Check
from .effects import LeftValue
from .loss import LossRegion, LossSpec
from .outcomes import Outcome
from .outputs import OutputTemplate
from .reads import Reads

AS_EAGER = "as eager runs it"
COMPILING = "with torch.compiler.is_compiling()"


@dataclass(frozen=True, kw_only=True)
class TakenPath:
    """The path that an earlier capture took through the model.

    Parameters
    ----------
    branch_free
        As :attr:`TracedStep.branch_free`.
    outcomes
        The answers that it received when it asked for values.
    """

    branch_free: bool
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class Reassigned:
    """A buffer or attribute that forward replaces, ``self.mean = 0.9 * self.mean + …``.

    Parameters
    ----------
    target
        Its name in the model.
    output
        Index into ``TracedStep.outputs`` of the new value.
    keeps_object
        Whether the tensor object stays and only its memory is replaced
        (``self.mean.data = …``).
    role
        ``"buffer"`` or ``"attribute"``.
    requires_grad
        Whether eager's tensor requires grad; no plan can differentiate through it.
    is_number
        Whether forward leaves there the number in the tensor instead of the tensor.
    """

    target: str
    output: int
    keeps_object: bool
    role: str = "buffer"
    requires_grad: bool = False
    is_number: bool = False


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """One training step as a torch.fx graph.

    Parameters
    ----------
    graph
        Placeholders carry ``meta["role"]`` (parameter, buffer, attribute, input,
        constant, tangent) and ``meta["target"]``; calls carry ``val``, ``phase``,
        ``writes``, ``module_path`` and ``source``. The output is
        ``(outputs, gradients)``.
    outputs
        Nodes of the tensors that forward returns, then those of ``reassigned``.
    template
        Rebuilds the model's own output structure from them.
    differentiated
        Indices into ``outputs`` whose gradient the backward expects.
    tangents
        Placeholders of those gradients, in the same order.
    gradients
        ``(placeholder, gradient node)`` of every leaf that receives one.
    constants
        Tensors that forward uses besides parameters, buffers and inputs.
    outcomes
        The answers that forward received when it asked for values of tensors.
    checks
        The values that the graph's checks compare; a check's last argument is an index here.
    reassigned
        Buffers and attributes that forward replaces.
    left
        Plain values that forward puts into attributes.
    made_to_require
        The tensors of the call that forward makes require grad.
    reads
        What else forward and backward read; it must stay unchanged.
    """

    graph: Graph
    outputs: tuple[Node, ...]
    template: OutputTemplate
    differentiated: tuple[int, ...]
    tangents: tuple[Node, ...]
    gradients: tuple[tuple[Node, Node], ...]
    constants: Mapping[str, torch.Tensor]
    loss: LossRegion
    detached: tuple[int, ...]
    how: str
    outcomes: tuple[Outcome, ...] = ()
    checks: tuple[Check, ...] = ()
    reassigned: tuple[Reassigned, ...] = ()
    left: tuple[LeftValue, ...] = ()
    made_to_require: tuple[int, ...] = ()
    reads: Reads = field(default_factory=Reads, compare=False)

    @property
    def branch_free(self) -> bool:
        """Whether libraries were told that a compiler is tracing."""
        return self.how == COMPILING

    @property
    def taken(self) -> TakenPath:
        """The path through the model, for taking it again."""
        return TakenPath(branch_free=self.branch_free, outcomes=self.outcomes)

    @cached_property
    def before_checks(self) -> BeforeChecks:
        """What must be restored if a check fails."""
        return before_checks(self.graph)

    @property
    def loss_spec(self) -> LossSpec:
        """What is needed to capture the same step without ``loss_fn``."""
        tangents = [n.meta["val"] for n in self.tangents]
        outputs = [n.meta["val"] for n in self.outputs]
        return LossSpec.of(self.loss, self.differentiated, tangents, outputs)
