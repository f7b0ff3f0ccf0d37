"""Chains of equal layers: as plain cost graphs, and captured from modules.

Modules are narrow and their batch is large, so that activations, not parameters, grow
with the number of layers. They lie on ``meta``: nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graph_capture.cost_graph import CostGraph, Operator, Storage

from .questions import captured_graph

DEVICE = "a100"
"""The device for times of captured chains: on a CPU, half of a step would draw dropout masks."""

LAYER_BYTES = 1_000_000
LAYER_NS = 1_000_000


def plain_chain(num_layers: int) -> CostGraph:
    """``f1 … fL``, the loss, ``bL … b1``; a layer costs c forward and 2 c backward.

    All results have the same size. ``b_i`` reads the layer's input and the gradient of
    its output. The step's input is resident and has no size. The loss costs nothing.
    """
    storages = [Storage(name="x", size_bytes=0, producer=None, category="input")]
    operators: list[Operator] = []

    def add(name: str, inputs: tuple[int, ...], **rest: object) -> int:
        k = len(storages)
        storages.append(Storage(name=name, size_bytes=LAYER_BYTES, producer=len(operators)))
        operators.append(Operator(name=name, inputs=inputs, outputs=(k,), **rest))  # type: ignore[arg-type]
        return k

    given = [0]
    for i in range(num_layers):
        given.append(add(f"f{i + 1}", (given[-1],), cost_ns=LAYER_NS, module_path=f"layers.{i}"))
    gradient = add("loss", (given[-1],), phase="loss", pinned="the loss")
    for i in reversed(range(num_layers)):
        gradient = add(
            f"b{i + 1}",
            (given[i], gradient),
            cost_ns=2 * LAYER_NS,
            phase="backward",
            module_path=f"layers.{i}",
        )
    return CostGraph(tuple(operators), tuple(storages))


class ResidualMLP(nn.Module):
    """A transformer's second half: layer norm, two linear layers with GELU, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.narrow(nn.functional.gelu(self.widen(self.norm(x))))
        return x + out


class Chain(nn.Module):
    """Layers in a row; the sum of the output is differentiated."""

    def __init__(self, num_layers: int, make_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(make_layer() for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).sum()  # type: ignore[no-any-return]


def mlp_chain(num_layers: int) -> CostGraph:
    """Residual MLPs of width 64 on 2^15 rows, captured."""
    with torch.device("meta"):
        return captured_graph(
            Chain(num_layers, lambda: ResidualMLP(64)).train(),
            torch.empty(2**15, 64),
            device=DEVICE,
        )


def transformer_chain(num_layers: int) -> CostGraph:
    """PyTorch's encoder layers of width 64 with dropout 0.1, 256 rows of 128, captured."""

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(
            64, nhead=2, dim_feedforward=256, dropout=0.1, batch_first=True
        )

    with torch.device("meta"):
        return captured_graph(
            Chain(num_layers, layer).train(), torch.empty(256, 128, 64), device=DEVICE
        )


FAMILIES: dict[str, Callable[[int], CostGraph]] = {
    "plain": plain_chain,
    "mlp": mlp_chain,
    "transformer": transformer_chain,
}
"""By name, functions from the number of layers to a step."""
