"""Training steps with module paths whose every storage and operator can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

from graph_capture.cost_graph import CostGraph, Operator, Phase, Storage

from .graphs import training_chain


class _Builder:
    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.storages: list[Storage] = []

    def add(
        self,
        name: str,
        inputs: tuple[int, ...],
        size_bytes: int = 1,
        *,
        target: str = "",
        path: str = "",
        phase: Phase = "forward",
        kept: bool = False,
        pinned: str | None = None,
    ) -> int:
        """An operator of unit cost with one output; that storage's index."""
        k = len(self.storages)
        self.storages.append(
            Storage(name=name, size_bytes=size_bytes, producer=len(self.operators), kept=kept)
        )
        self.operators.append(
            Operator(
                name=name,
                target=target,
                inputs=inputs,
                outputs=(k,),
                cost_ns=1,
                module_path=path,
                phase=phase,
                pinned=pinned,
            )
        )
        return k

    def graph(self) -> CostGraph:
        return CostGraph(tuple(self.operators), tuple(self.storages))


def unit_chain(num_layers: int, *, backward_cost_ns: int = 1) -> CostGraph:
    """``f0 … f(n-1)``, ``b(n-1) … b0``, all sizes one; ``b_i`` reads ``f_i``'s output."""
    graph = training_chain(num_layers, size_bytes=1, cost_ns=1)
    operators = tuple(
        replace(op, cost_ns=backward_cost_ns) if op.phase == "backward" else op
        for op in graph.operators
    )
    return CostGraph(operators, graph.storages)


def layered(num_layers: int) -> CostGraph:
    """Layers ``layers.i`` of two operators, all sizes and costs one.

    ``a_i`` reads the layer's input and makes ``u_i``, ``c_i`` reads ``u_i`` and
    makes ``h_i``; the loss reads the last ``h``. Backward, ``bc_i`` reads ``u_i``
    and ``ba_i`` the layer's input. Operators of three layers: a0 c0 a1 c1 a2 c2
    loss (0 to 6), bc2 ba2 bc1 ba1 bc0 ba0 (7 to 12).
    """
    step = _Builder()
    below: tuple[int, ...] = ()
    read: list[tuple[tuple[int, ...], int]] = []
    for i in range(num_layers):
        u = step.add(f"a{i}", below, path=f"layers.{i}.a")
        read.append((below, u))
        below = (step.add(f"c{i}", (u,), path=f"layers.{i}.c"),)
    gradient = step.add("loss", below, phase="loss", pinned="the training loop's")
    for i in reversed(range(num_layers)):
        entered, u = read[i]
        inner = step.add(f"bc{i}", (u, gradient), phase="backward", path=f"layers.{i}.c")
        gradient = step.add(f"ba{i}", (*entered, inner), phase="backward", path=f"layers.{i}.a")
    return step.graph()


TRANSFORMER_FORWARD = (
    "qkv",
    "scores",
    "softmax",
    "state",
    "mask",
    "drop",
    "context",
    "proj",
    "add",
)
TRANSFORMER_BACKWARD = ("proj_w", "context", "value", "drop", "softmax", "scores", "qkv_w", "qkv")


def transformer(num_layers: int) -> CostGraph:
    """Attention layers ``h.i`` with dropout; scores are of size 4, qkv of 3, all else of 1.

    Operators: wte (0); nine a layer (``TRANSFORMER_FORWARD``), of which ``state``
    is pinned; the loss; nine a layer backward (``TRANSFORMER_BACKWARD`` and the
    sum with the residual).
    """
    step = _Builder()
    hidden = step.add("wte", (), target="aten.embedding.default", path="wte")
    saved = []
    for i in range(num_layers):
        attn = f"h.{i}.attn"
        qkv = step.add(f"qkv{i}", (hidden,), 3, target="aten.mm.default", path=f"{attn}.qkv")
        scores = step.add(f"scores{i}", (qkv,), 4, target="aten.bmm.default", path=attn)
        soft = step.add(f"softmax{i}", (scores,), 4, target="aten._softmax.default", path=attn)
        state = step.add(f"state{i}", (), target="get_rng_state", path=attn, pinned="once")
        mask = step.add(f"mask{i}", (state,), target="aten.bernoulli_.float", path=attn)
        drop = step.add(f"drop{i}", (soft, mask), 4, target="aten.mul.Tensor", path=attn)
        context = step.add(f"context{i}", (drop, qkv), target="aten.bmm.default", path=attn)
        proj = step.add(f"proj{i}", (context,), target="aten.addmm.default", path=f"{attn}.proj")
        saved.append((hidden, qkv, soft, mask, drop, context))
        hidden = step.add(f"add{i}", (hidden, proj), target="aten.add.Tensor", path=f"h.{i}")
    g = step.add("loss", (hidden,), phase="loss", pinned="the training loop's")
    for i in reversed(range(num_layers)):
        entered, qkv, soft, mask, drop, context = saved[i]

        def back(name: str, inputs: tuple[int, ...], size: int = 1, kept: bool = False) -> int:
            return step.add(f"b_{name}{i}", inputs, size, phase="backward", kept=kept)  # noqa: B023

        back("proj_w", (context, g), kept=True)
        g_drop = back("context", (g, qkv), 4)
        g_value = back("value", (drop, g))
        g_soft = back("drop", (mask, g_drop), 4)
        g_scores = back("softmax", (soft, g_soft), 4)
        g_qkv = back("scores", (g_scores, qkv), 3)
        back("qkv_w", (entered, g_qkv, g_value), kept=True)
        g_entered = back("qkv", (g_qkv,))
        g = back("add", (g, g_entered))
    return step.graph()


def with_paths(paths: list[str], targets: list[str] | None = None) -> CostGraph:
    """A chain of forward operators with these module paths, and one backward operator."""
    step = _Builder()
    below: tuple[int, ...] = ()
    for i, path in enumerate(paths):
        target = targets[i] if targets else "aten.mm.default"
        below = (step.add(f"o{i}", below, path=path, target=target),)
    step.add("loss", below, phase="loss")
    step.add("b", below, phase="backward")
    return step.graph()
