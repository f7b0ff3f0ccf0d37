"""Where a rank is in a mesh, and what it has beside the step of its own modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graph_capture.loop.loop_holds import Grads, Outputs

from .mesh import DataParallelKind, Mesh


@dataclass(frozen=True, kw_only=True)
class Around:
    """Where a rank is in the mesh, and how its loop runs."""

    mesh: Mesh
    stage: int
    number: int
    flying: int
    data_parallel: DataParallelKind
    outputs: Outputs
    granularity: str
    blocks: str | Sequence[str]

    @property
    def grads(self) -> Grads:
        """Micro-batches add up their gradients."""
        return "accumulated" if self.number > 1 else "none"

    @property
    def word(self) -> str | None:
        """What is around the module, where the planner counts it by itself."""
        if self.mesh.dp == 1 or self.mesh.pp > 1:
            return None
        return "ddp" if self.data_parallel == "ddp" else f"fsdp2:ranks={self.mesh.dp}"

    def beside(self, module: nn.Module, sample: Mapping[str, Any], largest: int) -> dict[str, int]:
        """Bytes that a rank has beside its own step."""
        found = {}
        if self.mesh.dp > 1 and self.mesh.pp > 1:  # as many as DistributedDataParallel's buckets
            found["bucket"] = gradient_bytes(module)
        received = sample.get("inputs_embeds")
        if self.stage > 0 and isinstance(received, torch.Tensor):
            found["received"] = (self.number - self.flying) * tensor_bytes(received)
        if self.mesh.tp > 1:
            found["collective"] = largest
        return {name: size for name, size in found.items() if size}


def gradient_bytes(module: nn.Module) -> int:
    """Return the bytes of all gradients of a module's parameters."""
    return sum(tensor_bytes(p) for p in module.parameters() if p.requires_grad)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
