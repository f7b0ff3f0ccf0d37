"""What holds of every strategy on every graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy

from .graphs import INSTANCES, cost_graphs, random_dag, random_step
from .strategy_graphs import layered, transformer, unit_chain

SOLVING = {
    "auto",
    "rotor_menus",
    "checkmate_milp",
    "checkmate_lp_rounding",
    "moccasin",
    "uniform_bytes",
}
QUICK = sorted(set(STRATEGIES) - SOLVING)
LARGE = {"G2", "gpt2_L12", "chain64h"}
"""Instances on which all strategies together take more than a second or two."""
ONE_FORWARD = (
    "uniform_sqrt",
    "uniform_every_k",
    "chen_greedy",
    "transformers_per_layer",
    "transformers_every_n_layers",
    "megatron_selective",
    "megatron_full_uniform",
    "megatron_full_block",
    "save_only_matmuls",
    "save_matmuls_per_block",
    "ap_sqrt",
    "ap_greedy",
    "linearized_sqrt",
    "linearized_greedy",
)
"""Strategies that run nothing more than twice."""


def check(name: str, graph: CostGraph, budget_bytes: int | None) -> bool:
    """Whether a strategy applies; if so, that its claims are what the judge says."""
    try:
        outcome = apply_strategy(STRATEGIES[name], graph, budget_bytes=budget_bytes)
    except StrategyError:
        return False
    judged = replay(graph, outcome.schedule)
    assert (outcome.peak_bytes, outcome.cost_ns) == (judged.peak_bytes, judged.cost_ns)
    assert outcome.fits == (budget_bytes is None or judged.peak_bytes <= budget_bytes)
    order = outcome.schedule.order
    assert list(dict.fromkeys(order)) == sorted(set(order))
    again = outcome.schedule.recomputed()
    assert all(graph.operators[v].pinned is None for v in again)
    if name in ONE_FORWARD:
        assert max(again.values(), default=1) == 1
    return True


@pytest.mark.parametrize("name", QUICK)
@given(st.integers(0, 10**6), st.integers(4, 10), st.sampled_from([random_step, random_dag]))
def test_valid_on_random_graphs(
    name: str, seed: int, tenths: int, family: Callable[[int], CostGraph]
) -> None:
    """Valid, in base order, pinned operators once, within the budget where it says so."""
    graph = family(seed)
    check(name, graph, keep_all_peak_bytes(graph) * tenths // 10)
    check(name, graph, None)


@pytest.mark.parametrize("name", QUICK)
@given(cost_graphs())
def test_valid_on_graphs_with_everything(name: str, graph: CostGraph) -> None:
    """Operators without outputs, ordered ones, kept storages in the middle, zero sizes."""
    check(name, graph, budget_of(graph, 0.7))
    check(name, graph, None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[pytest.mark.slow] if path.stem in LARGE else [])
        for path in sorted(INSTANCES.glob("*.json"))
    ],
)
def test_valid_on_instances(name: str) -> None:
    """At 70 % of the keep-all peak and without a budget; most strategies need no module paths."""
    graph = load_instance(INSTANCES / f"{name}.json")
    applied = {strategy for strategy in QUICK if check(strategy, graph, None)}
    assert {"none", "uniform_sqrt", "uniform_every_k", "chen_greedy", "revolve"} <= applied
    assert {"linearized_sqrt", "linearized_greedy", "chen_recursive"} <= applied
    for strategy in QUICK:
        check(strategy, graph, budget_of(graph, 0.7))


def test_every_strategy_applies_to_a_transformer() -> None:
    """With module paths, attention, dropout and matrix products none has a reason not to."""
    graph = transformer(6)
    budget = budget_of(graph, 0.8)
    for name in QUICK:
        assert check(name, graph, budget), name
        if not STRATEGIES[name].needs_budget:
            assert check(name, graph, None), name


@pytest.mark.parametrize("name", ["uniform_sqrt", "chen_greedy", "ap_sqrt", "linearized_sqrt"])
def test_memory_grows_with_the_square_root_of_depth(name: str) -> None:
    """n layers: at most 3 sqrt(n) + 3 bytes for at most one more forward pass.

    With a backward pass of twice the forward's time that is 33 % at most, and,
    from 64 layers on, 25 % at least: a baseline that recomputes nothing fails.
    """
    for num_layers in (16, 64, 144, 256):
        graph = unit_chain(num_layers, backward_cost_ns=2)
        outcome = apply_strategy(STRATEGIES[name], graph)
        assert outcome.peak_bytes <= 3 * math.sqrt(num_layers) + 3
        overhead = outcome.cost_ns / graph.base_cost_ns - 1
        assert overhead <= 1 / 3
        if num_layers >= 64:
            assert overhead >= 0.25
            assert outcome.peak_bytes < 0.5 * keep_all_peak_bytes(graph)


def test_quadrupling_the_depth_doubles_the_memory() -> None:
    """The slope of uniform sqrt(L) itself, from 64 to 256 to 1024 layers."""
    peaks = [
        apply_strategy(STRATEGIES["uniform_sqrt"], unit_chain(n)).peak_bytes
        for n in (64, 256, 1024)
    ]
    for smaller, larger in itertools.pairwise(peaks):
        assert 1.8 <= larger / smaller <= 2.2


def test_per_layer_grows_with_depth_by_one_boundary_a_layer() -> None:
    """Layers of two operators: one byte a layer beside one layer's own, for one forward at most."""
    for num_layers in (4, 16, 64):
        graph = layered(num_layers)
        outcome = apply_strategy(STRATEGIES["transformers_per_layer"], graph)
        assert outcome.peak_bytes == num_layers + 2
        assert outcome.cost_ns == graph.base_cost_ns + num_layers


@given(st.integers(0, 10**6))
def test_none_is_keep_all(seed: int) -> None:
    """Whatever the graph."""
    graph = random_step(seed)
    assert apply_strategy(STRATEGIES["none"], graph).schedule == Schedule.keep_all(graph)
