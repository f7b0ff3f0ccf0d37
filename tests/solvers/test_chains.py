from __future__ import annotations

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.arrays import GraphArrays, graph_arrays
from solvers.chains.chain import Chain, coarsen, find_chain
from solvers.instances import load_instance
from solvers.uniform import turning_point

from .graphs import INSTANCES, training_chain


def chain_of(graph: CostGraph) -> tuple[GraphArrays, Chain | None]:
    g = graph_arrays(graph)
    return g, find_chain(g, turning_point(graph))


def masked_chain(num_layers: int) -> CostGraph:
    """A forward chain whose every layer also reads a mask that operator 0 makes."""
    storages = [Storage(name="mask", size_bytes=1, producer=0)]
    operators = [Operator(name="mask", outputs=(0,))]
    for i in range(num_layers):
        storages.append(Storage(name=f"x{i}", size_bytes=10, producer=i + 1))
        operators.append(
            Operator(name=f"f{i}", inputs=(0, i) if i else (0,), outputs=(i + 1,), cost_ns=5)
        )
    for i in reversed(range(num_layers)):
        k = len(storages)
        inputs = (i + 1,) if i == num_layers - 1 else (i + 1, k - 1)
        operators.append(Operator(name=f"b{i}", inputs=inputs, outputs=(k,), phase="backward"))
        storages.append(Storage(name=f"g{i}", size_bytes=10, producer=len(operators) - 1))
    return CostGraph(tuple(operators), tuple(storages))


def test_every_layer_of_a_chain_is_a_block() -> None:
    """Six layers: b5 and b4 go with block 5, whose boundary b4 reads; b_(i-1) goes with block i."""
    _, chain = chain_of(training_chain(6))
    assert chain is not None
    assert chain.cuts == (0, 1, 2, 3, 4, 5, 6)
    assert chain.boundaries == ((), (0,), (1,), (2,), (3,), (4,))
    assert chain.ends == (12, 12, 11, 10, 9, 8, 6)
    assert chain.held == frozenset()


def test_what_everybody_reads_is_held() -> None:
    """A mask that is read by all layers crosses all cuts and is no part of a boundary."""
    _, chain = chain_of(masked_chain(8))
    assert chain is not None
    assert 0 in chain.held
    assert chain.num_blocks >= 8
    assert all(len(boundary) <= 1 for boundary in chain.boundaries)


def test_a_backward_part_reads_nothing_earlier_than_its_boundary() -> None:
    """In a GPT-2 step, whatever a block's backward part reads is its own, later, or held."""
    g, chain = chain_of(load_instance(INSTANCES / "gpt2_L2.json"))
    assert chain is not None
    for i in range(chain.num_blocks):
        at_hand = chain.held.union(chain.boundaries[i])
        for v in range(chain.ends[i + 1], chain.ends[i]):
            for k in g.inputs(v):
                assert g.producer[k] >= chain.cuts[i] or int(k) in at_hand


def test_coarse_chains_keep_the_cuts_that_are_named() -> None:
    """Blocks between the remaining cuts are joined, forward and backward."""
    g, chain = chain_of(training_chain(6))
    assert chain is not None
    coarse = coarsen(g, chain, [2, 4])
    assert coarse.cuts == (0, 2, 4, 6)
    assert coarse.boundaries == ((), (1,), (3,))
    assert coarse.ends == (12, 11, 9, 6)


def test_a_dense_graph_is_no_chain() -> None:
    """Random layered graphs have next to no cuts."""
    assert chain_of(load_instance(INSTANCES / "G1.json"))[1] is None


def test_a_single_operator_is_no_chain() -> None:
    """There is nothing to divide."""
    assert chain_of(training_chain(1))[1] is None
