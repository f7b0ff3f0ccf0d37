"""What is recomputed by kind of call: attention cores, everything but matrix products."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graph_capture.cost_graph import CostGraph, Operator
from solvers.instances import load_instance
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy
from solvers.strategies.attention import attention_cores, megatron_selective
from solvers.strategies.policies import (
    is_matrix_product,
    matrix_products,
    save_matmuls_per_block,
    save_only_matmuls,
)

from .graphs import INSTANCES
from .strategy_graphs import transformer, unit_chain


def test_core_of_one_layer() -> None:
    """Scores, softmax, the mask drawn for it, dropout, context; not the pinned random state."""
    assert attention_cores(transformer(1)) == [[2, 3, 5, 6, 7]]
    assert attention_cores(transformer(2)) == [[2, 3, 5, 6, 7], [11, 12, 14, 15, 16]]


def test_the_core_runs_again_in_one_go() -> None:
    """Before the first gradient that reads the dropout's output (of the values, operator 13)."""
    graph = transformer(1)
    schedule = megatron_selective(graph)
    assert schedule.order == (*range(13), 2, 3, 5, 6, 7, *range(13, 20))
    assert replay(graph, schedule).cost_ns == 20 + 5


def test_selective_saves_the_cores_of_the_other_layers() -> None:
    """Two layers: under the second's backward pass the first holds 6 bytes and not 14.

    Of the first layer keep-all holds its input 1, qkv 3, softmax 4, mask 1,
    dropout 4, context 1; selective its input, qkv, context and the random state.
    The second layer's own 20 bytes (input 1, qkv 3, softmax 4, mask 1, dropout 4,
    gradients 1 + 1 + 4 + 1) are the same in both.
    """
    graph = transformer(2)
    keep_all = replay(graph, Schedule.keep_all(graph))
    selective = replay(graph, megatron_selective(graph))
    assert keep_all.peak_bytes == 20 + 14
    assert selective.peak_bytes == 20 + 6
    assert selective.cost_ns == keep_all.cost_ns + 2 * 5


def _with_target(graph: CostGraph, name: str, target: str) -> CostGraph:
    operators = tuple(
        replace(op, target=target) if op.name.startswith(name) else op for op in graph.operators
    )
    return CostGraph(operators, graph.storages)


def test_copies_of_arguments_join_the_core_where_nothing_more_is_saved() -> None:
    """A unary call between qkv and the scores joins; one that needs more than it makes does not."""
    graph = transformer(1)
    plain = _with_target(graph, "qkv", "aten.mul.Scalar")  # reads 1 byte, makes 3
    assert attention_cores(plain)[0] == [1, 2, 3, 5, 6, 7]
    large = replace(graph.storages[0], size_bytes=5)  # now it reads 5 and makes 3
    more = CostGraph(plain.operators, (large, *plain.storages[1:]))
    assert attention_cores(more)[0] == [2, 3, 5, 6, 7]


def test_no_attention_core() -> None:
    """Fused attention, and none at all, are told apart."""
    fused = _with_target(transformer(1), "scores", "aten._scaled_dot_product_flash_attention.x")
    fused = _with_target(fused, "softmax", "aten.mul.Tensor")
    with pytest.raises(StrategyError, match="attention is fused"):
        attention_cores(fused)
    with pytest.raises(StrategyError, match="no softmax between two batched matrix products"):
        apply_strategy(STRATEGIES["megatron_selective"], unit_chain(5))


def test_which_operators_are_matrix_products() -> None:
    """By the calls they stand for, and by layers' names in instances of other papers."""
    products = ["aten.addmm.default+relu_.default", "addmm_3", "block1_conv2", "conv2d_transpose_1"]
    others = ["aten.native_layer_norm.default", "aten._softmax.default", "block1_pool", "mul"]
    assert all(is_matrix_product(Operator(name="o", target=target)) for target in products)
    assert not any(is_matrix_product(Operator(name="o", target=target)) for target in others)


def test_save_only_matmuls_on_one_layer() -> None:
    """Saved: qkv, scores, context, proj. Again: softmax, mask, dropout, at last the embedding."""
    graph = transformer(1)
    assert matrix_products(graph) == [1, 2, 7, 8]
    schedule = save_only_matmuls(graph)
    assert schedule.order == (*range(13), 3, 5, 6, 13, 14, 15, 16, 0, 17, 18, 19)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 20 + 4
    # Under operator 14: qkv 3, scores 4 (dead after the softmax's second run), softmax 4,
    # mask 1, gradients 1 + 1 + 4 + 1 + 4.
    assert outcome.memory_bytes[13 + 3 + 1] == 19


def test_save_matmuls_per_block_saves_inputs_and_products() -> None:
    """Each block runs again in one go, up to what is wanted, without its matrix products."""
    graph = transformer(2)
    schedule = save_matmuls_per_block(graph)
    # Forward is 0 to 19, the second layer's backward part 20 to 28; 22 reads the dropout.
    second, first = (12, 14, 15), (3, 5, 6)
    assert schedule.order == (*range(22), *second, *range(22, 31), *first, *range(31, 38))


def test_instances_have_names_and_no_paths() -> None:
    """The 12-layer GPT-2 of another paper has matrix products and attention, but no blocks."""
    graph = load_instance(INSTANCES / "gpt2_L12.json")
    assert len(attention_cores(graph)) == 12
    kept = replay(graph, Schedule.keep_all(graph))
    outcome = apply_strategy(STRATEGIES["save_only_matmuls"], graph)
    assert outcome.peak_bytes < kept.peak_bytes
    assert kept.cost_ns < outcome.cost_ns < 1.2 * kept.cost_ns
    with pytest.raises(StrategyError, match="no repeated blocks"):
        apply_strategy(STRATEGIES["save_matmuls_per_block"], graph)


def test_no_matrix_products() -> None:
    """The error names what it looked for."""
    with pytest.raises(StrategyError, match="no matrix products"):
        apply_strategy(STRATEGIES["save_only_matmuls"], unit_chain(5))
