"""The result of tracing: one training step as a torch.fx graph, with its properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.fx import Graph, Node

from ..calls.storage_id import storage_id
from ..loop.loss import LossRegion, LossSource, LossSpec
from ..reads.reads import Reads
from ..recording.effects import LeftValue
from ..recording.outputs import OutputTemplate
from ..values.before_checks import BeforeChecks, before_checks
from ..values.checks import Check
from ..values.outcomes import Outcome

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
        constant, tangent) and ``meta["target"]``, inputs that other modules have computed
        ``meta["computed"]``; calls carry ``val``, ``phase``,
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
    arrivals
        For each of them its turn among the gradients of eager's backward pass, and the last
        node before it arrived at its leaf.
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
    arrivals: tuple[tuple[int, Node], ...] = ()
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

    @cached_property
    def releasable(self) -> tuple[int, ...]:
        """Outputs that die with the last who holds them, where a loop has a loss and lets go.

        Not what lies in the memory of a parameter, an input or a tensor that forward leaves
        in the model, and not the loss.
        """
        if self.loss.source is LossSource.OUTPUTS:
            return ()
        stay = {
            storage_id(node.meta["val"])
            for node in self.graph.find_nodes(op="placeholder")
            if node.meta["role"] != "tangent"
        }
        stay |= {storage_id(self.outputs[entry.output].meta["val"]) for entry in self.reassigned}
        stay |= {storage_id(gradient.meta["val"]) for _, gradient in self.gradients}
        if self.loss.source is not LossSource.LOSS_FN:
            stay |= {storage_id(self.outputs[i].meta["val"]) for i in self.differentiated}
        return tuple(
            i
            for i in range(len(self.template.names))
            if storage_id(self.outputs[i].meta["val"]) not in stay
        )

    def gone_bytes(self) -> dict[int, int]:
        """Bytes of each memory that is gone with its outputs, by the first of these.

        What backward reads is saved, by eager at least.
        """
        read = {
            storage_id(argument.meta["val"])
            for node in self.graph.nodes
            if node.meta.get("phase") == "backward"
            for argument in node.all_input_nodes
            if isinstance(argument.meta["val"], torch.Tensor)
        }
        found: dict[int, int] = {}
        sizes: dict[int, int] = {}
        for i in self.releasable:
            memory = self.outputs[i].meta["val"]
            if storage_id(memory) not in read | found.keys():
                found[storage_id(memory)] = i
                sizes[i] = memory.untyped_storage().nbytes()
        return sizes

    @property
    def loss_spec(self) -> LossSpec:
        """What is needed to capture the same step without ``loss_fn``."""
        tangents = [n.meta["val"] for n in self.tangents]
        outputs = [n.meta["val"] for n in self.outputs]
        return LossSpec.of(self.loss, self.differentiated, tangents, outputs)
