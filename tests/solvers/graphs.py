"""Small graphs for the solvers' tests: random DAGs, random training steps, chains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Phase, Storage
from solvers.instances import keep_all_peak_bytes

from .brute_force import least_cost, least_memory_exact

exhaustive_optimum = least_cost
"""The name under which most tests know it."""

INSTANCES = Path(__file__).parent / "instances"


@st.composite
def cost_graphs(draw: st.DrawFn, max_operators: int = 6) -> CostGraph:
    """A random step with everything that a cost graph can say."""
    num_operators = draw(st.integers(1, max_operators))
    storages = [Storage(name="resident", size_bytes=draw(st.integers(0, 3)), producer=None)]
    operators: list[Operator] = []
    for v in range(num_operators):
        inputs = draw(st.sets(st.integers(0, len(storages) - 1), max_size=3))
        num_outputs = draw(st.sampled_from([1, 1, 1, 2, 0]))
        outputs = tuple(range(len(storages), len(storages) + num_outputs))
        for k in outputs:
            storages.append(
                Storage(
                    name=f"s{k}",
                    size_bytes=draw(st.integers(0, 6)),
                    producer=v,
                    kept=draw(st.sampled_from([False] * 5 + [True])),
                )
            )
        operators.append(
            Operator(
                name=f"o{v}",
                inputs=tuple(inputs),
                outputs=outputs,
                cost_ns=draw(st.integers(0, 5)),
                workspace_bytes=draw(st.sampled_from([0, 0, 0, 2])),
                pinned=draw(st.sampled_from([None] * 5 + ["test"])),
                ordered=draw(st.booleans()),
            )
        )
    return CostGraph(tuple(operators), tuple(storages))


@st.composite
def overwriting_graphs(draw: st.DrawFn, max_operators: int = 6) -> CostGraph:
    """A random step of which some operators write over what they read."""
    graph = draw(cost_graphs(max_operators=max_operators))
    storages = list(graph.storages)
    operators = list(graph.operators)
    for v, op in enumerate(operators):
        olds = [k for k in op.inputs if storages[k].producer is not None and not storages[k].kept]
        if not olds or not op.outputs or draw(st.sampled_from([False, False, True])):
            continue
        old, new = draw(st.sampled_from(olds)), op.outputs[0]
        storages[new] = replace(storages[new], size_bytes=storages[old].size_bytes)
        operators[v] = replace(op, rewrites=((old, new, draw(st.integers(0, 4))),))
    return CostGraph(tuple(operators), tuple(storages))


def random_dag(seed: int, *, max_operators: int = 9) -> CostGraph:
    """A DAG without the shape of training: what is made is read, some of it much later.

    Now and then an operator makes two storages or one that is kept, is pinned
    or needs scratch memory; costs and sizes may be zero.
    """
    rng = Random(seed)
    step = _RandomStep(rng)
    num_operators = rng.randint(4, max_operators)
    unread: set[int] = set()
    for v in range(num_operators):
        there = range(1, len(step.storages))
        reads = set(rng.sample(there, min(len(there), rng.choice([1, 1, 2])))) or {0}
        if v == num_operators - 1:
            reads |= unread
        elif len(unread) >= num_operators - v:
            reads.add(min(unread))
        made = step.add(f"o{v}", "forward", reads, [rng.random() < 0.05] * rng.choice([1, 1, 1, 2]))
        unread = (unread - reads) | set(made)
    return step.graph()


def random_step(seed: int, *, max_layers: int = 4) -> CostGraph:
    """A step of the shape that training has: forward, loss, backward in reverse.

    A layer reads the one before and perhaps an earlier one, and may leave a
    mask beside its result. Its backward operator reads the gradient from
    above, what the layer read or made (or both) and the mask, and makes the
    gradient below and perhaps a gradient of weights, which is kept, as is the
    value of the loss. Now and then an operator is pinned or needs scratch
    memory; costs and sizes may be zero.
    """
    rng = Random(seed)
    step = _RandomStep(rng)
    num_layers = rng.randint(2, max_layers)
    below = 0  # what the next layer reads
    layers: list[tuple[int, list[int]]] = []
    for i in range(num_layers):
        reads = {below}
        if i > 1 and rng.random() < 0.5:
            reads.add(layers[rng.randint(0, i - 2)][1][0])
        made = step.add(f"f{i}", "forward", reads, [False] * rng.choice([1, 1, 2]))
        layers.append((below, made))
        below = made[0]
    gradient = step.add("loss", "loss", {below}, [False, True])[0]
    for i in reversed(range(num_layers)):
        read, made = layers[i]
        saved = rng.choice([{read}, {made[0]}, {read, made[0]}])
        kept = rng.choice([[False], [False, True]])
        gradient = step.add(f"b{i}", "backward", {gradient, *saved, *made[1:]}, kept)[0]
    return step.graph()


class _RandomStep:
    """A graph in the making, with figures from ``rng``; storage 0 is resident."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.storages = [Storage(name="weights", size_bytes=rng.randint(0, 3), producer=None)]
        self.operators: list[Operator] = []

    def add(self, name: str, phase: Phase, reads: set[int], kept: list[bool]) -> list[int]:
        """An operator that makes a storage for each of ``kept``; their indices."""
        rng = self.rng
        outputs = list(range(len(self.storages), len(self.storages) + len(kept)))
        for k, keep in zip(outputs, kept, strict=True):
            size_bytes, producer = rng.randint(0, 7), len(self.operators)
            self.storages.append(
                Storage(name=f"s{k}", size_bytes=size_bytes, producer=producer, kept=keep)
            )
        self.operators.append(
            Operator(
                name=name,
                inputs=tuple(sorted(reads)),
                outputs=tuple(outputs),
                cost_ns=rng.randint(0, 7),
                workspace_bytes=rng.choice([0, 0, 0, 2]),
                phase=phase,
                pinned="test" if rng.random() < 0.05 else None,
            )
        )
        return outputs

    def graph(self) -> CostGraph:
        return CostGraph(tuple(self.operators), tuple(self.storages))


def random_order(graph: CostGraph, seed: int, *, staged: bool = False) -> list[int]:
    """The base order with earlier operators run again anywhere between, whether of use or not.

    Parameters
    ----------
    staged
        Between two first runs, each at most once and in base order.
    """
    rng = Random(seed)
    order: list[int] = []
    for v in range(graph.num_operators):
        again = [u for u in range(v) if graph.operators[u].pinned is None]
        chosen = rng.choices(again, k=rng.choice([0, 0, 1, 2, 4])) if again else []
        order += sorted(set(chosen)) if staged else chosen
        order.append(v)
    return order


def budget_within(graph: CostGraph, seed: int) -> int:
    """Mostly from the least that anything fits in up to the keep-all peak, now and then below."""
    rng = Random(seed)
    lowest, peak = least_memory_exact(graph), keep_all_peak_bytes(graph)
    if rng.random() < 0.15:
        return rng.randint(max(0, lowest - 5), max(0, lowest - 1))
    return rng.randint(lowest, max(lowest, peak - 1))


def training_chain(
    num_layers: int, *, size_bytes: int = 10, cost_ns: int = 10, with_phases: bool = True
) -> CostGraph:
    """``f0 … f(L-1)`` forward, then ``b(L-1) … b0``; ``b_i`` reads ``f_i`` and ``b_(i+1)``."""
    storages = [
        Storage(name=f"x{v}", size_bytes=size_bytes, producer=v) for v in range(2 * num_layers)
    ]
    operators = [
        Operator(name=f"f{i}", inputs=(i - 1,) if i else (), outputs=(i,), cost_ns=cost_ns)
        for i in range(num_layers)
    ]
    for j in range(num_layers):
        i = num_layers - 1 - j
        v = num_layers + j
        operators.append(
            Operator(
                name=f"b{i}",
                inputs=(i,) if j == 0 else (i, v - 1),
                outputs=(v,),
                cost_ns=cost_ns,
                phase="backward" if with_phases else "forward",
            )
        )
    return CostGraph(tuple(operators), tuple(storages))
