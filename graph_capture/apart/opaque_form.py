"""What the rest of a step sees of a module that stands for itself: its tensors, not its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calls.call_spec import TensorSpec
from ..calls.storage_id import storage_id
from ..captured_step import CapturedStep
from ..errors import NotFittingError
from ..private_torch.operators import OpOverload, schema_of
from ..recording.outputs import OutputTemplate
from ..tracing.traced_step import TracedStep

Form = tuple["MadeTensor", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeTensor:
    """A tensor that a call makes, or passes on.

    Parameters
    ----------
    spec
        Its shape, strides, dtype and device.
    offset
        Elements of its memory before the first one.
    memory
        Number of its memory among those that the call makes; -1 for a tensor passed on.
    size_bytes
        Of that memory.
    given
        Index of the tensor that is passed on; ``None`` for one that is made.
    """

    spec: TensorSpec
    offset: int = 0
    memory: int = -1
    size_bytes: int = 0
    given: int | None = None


@dataclass(frozen=True, kw_only=True)
class OpaqueForm:
    """All that the rest of a step sees of a module's call.

    Parameters
    ----------
    outputs
        The tensors that it returns; ``given`` are tensors of the call.
    template
        How they are returned.
    differentiated
        Those that a gradient comes back for.
    gradients
        Its gradients, in the order of ``leaves``; ``given`` are gradients of
        ``differentiated``.
    leaves
        For each the index of the tensor of the call, or the name of the parameter.
    summed
        Those of the gradients that are sums of several contributions.
    divisions
        For each gradient how it is divided among ranks; ``None`` for plain tensors.
    """

    outputs: Form
    template: OutputTemplate
    differentiated: tuple[int, ...]
    gradients: Form
    leaves: tuple[int | str, ...]
    summed: frozenset[int]
    divisions: tuple[Any, ...]

    @classmethod
    def of(cls, captured: CapturedStep) -> OpaqueForm:
        """Return the form of a module's captured step.

        Raises
        ------
        NotFittingError
            When it does what cannot stand apart from the rest of the step.
        """
        step = captured.step
        if step.reassigned or step.left or step.made_to_require:
            what = [*step.reassigned, *step.left]
            name = getattr(what[0], "target", "an attribute") if what else "an argument"
            raise NotFittingError(f"its forward replaces {name!r}, which later calls may read")
        inputs = {
            storage_id(node.meta["val"]): int(node.meta["target"])
            for node in step.graph.find_nodes(op="placeholder")
            if node.meta["role"] == "input"
        }
        tangents = {storage_id(node.meta["val"]): i for i, node in enumerate(step.tangents)}
        own = {
            storage_id(node.meta["val"])
            for node in step.graph.find_nodes(op="placeholder")
            if node.meta["role"] not in ("input", "tangent")
        }
        outputs = [step.outputs[i].meta["val"] for i in range(len(step.template.names))]
        if any(storage_id(value) in own for value in outputs):
            raise NotFittingError("it returns a parameter or buffer of its own")
        return cls(
            outputs=_made(outputs, inputs),
            template=step.template,
            differentiated=step.differentiated,
            gradients=_made([gradient.meta["val"] for _, gradient in step.gradients], tangents),
            leaves=tuple(
                int(leaf.meta["target"])
                if leaf.meta["role"] == "input"
                else str(leaf.meta["target"])
                for leaf, _ in step.gradients
            ),
            summed=_sums(step),
            divisions=tuple(leaf.meta.get("division") for leaf, _ in step.gradients),
        )


def fresh_tensors(form: Form) -> list[torch.Tensor]:
    """Return the tensors that a form says are made, without values."""
    memory: dict[int, torch.Tensor] = {}
    made = []
    for tensor in form:
        if tensor.given is not None:
            continue
        spec = tensor.spec
        if tensor.size_bytes == spec.extent_bytes and not tensor.offset:
            alone = sum(other.memory == tensor.memory for other in form) == 1
            if alone:
                made.append(
                    torch.empty_strided(
                        spec.shape, spec.stride, dtype=spec.dtype, device=spec.device
                    )
                )
                continue
        if tensor.memory not in memory:
            memory[tensor.memory] = torch.empty(
                tensor.size_bytes, dtype=torch.uint8, device=spec.device
            )
        elements = memory[tensor.memory].view(spec.dtype)
        made.append(elements.as_strided(spec.shape, spec.stride, tensor.offset))
    return made


def placed(
    form: Form, fresh: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The tensors of a form: those made, and those passed on."""
    left = iter(fresh)
    return [next(left) if tensor.given is None else given[tensor.given] for tensor in form]


def _made(values: Sequence[torch.Tensor], given: Mapping[int, int]) -> Form:
    memory: dict[int, int] = {}
    made = []
    for value in values:
        spec = TensorSpec.of(value.detach())
        sid = storage_id(value)
        if sid in given:
            made.append(MadeTensor(spec=spec, given=given[sid]))
            continue
        made.append(
            MadeTensor(
                spec=spec,
                offset=int(value.storage_offset()),
                memory=memory.setdefault(sid, len(memory)),
                size_bytes=value.untyped_storage().nbytes(),
            )
        )
    return tuple(made)


def _sums(step: TracedStep) -> frozenset[int]:
    """The gradients that autograd adds up, or that end in a sum for another reason."""
    added = {
        storage_id(node.meta["val"])
        for node in step.graph.nodes
        if node.meta.get("phase") == "backward"
        and isinstance(node.target, OpOverload)
        and schema_of(node.target).name in ("aten::add", "aten::add_")
        and isinstance(node.meta["val"], torch.Tensor)
    }
    return frozenset(
        i
        for i, (_, gradient) in enumerate(step.gradients)
        if storage_id(gradient.meta["val"]) in added
    )
