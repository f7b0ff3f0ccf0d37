"""rotor as published: a stage saves its input or everything, counted by hand and by search."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.arrays import graph_arrays
from solvers.chains.chain import find_chain
from solvers.chains.rotor import chain_of_stages, rotor
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.replay import replay
from solvers.strategies import STRATEGIES, StrategyError, StrategyOutcome, apply_strategy
from solvers.uniform import turning_point

from .graphs import INSTANCES, cost_graphs, exhaustive_optimum, training_chain
from .strategy_graphs import layered, unit_chain


def partly_saved(num_layers: int, *, with_paths: bool = True) -> CostGraph:
    """Layers in which it is best to save one storage and make the other again.

    ``a_i`` (10 ns) makes ``u_i`` (1 byte), ``b_i`` of that ``v_i`` (3 bytes), ``c_i`` of
    that ``h_i``; after the loss ``d_i`` reads ``u_i`` and ``v_i``. The others take 1 ns and
    make 1 byte.
    """
    operators: list[Operator] = []
    storages: list[Storage] = []

    def add(name: str, inputs: tuple[int, ...], path: str = "", size_bytes: int = 1) -> int:
        k = len(operators)
        storages.append(Storage(name=name, size_bytes=size_bytes, producer=k))
        operators.append(
            Operator(
                name=name,
                inputs=inputs,
                outputs=(k,),
                cost_ns=10 if name[0] == "a" else 1,
                module_path=path if with_paths else "",
                phase="backward" if name[0] == "d" else "forward",
            )
        )
        return k

    below: tuple[int, ...] = ()
    read: list[tuple[int, int]] = []
    for i in range(num_layers):
        u = add(f"a{i}", below, f"layers.{i}.a")
        v = add(f"b{i}", (u,), f"layers.{i}.b", 3)
        below = (add(f"c{i}", (v,), f"layers.{i}.c"),)
        read.append((u, v))
    gradient = add("loss", below)
    for i in reversed(range(num_layers)):
        gradient = add(f"d{i}", (*read[i], gradient), f"layers.{i}")
    return CostGraph(tuple(operators), tuple(storages))


def applied(graph: CostGraph, budget_bytes: int, name: str = "rotor") -> StrategyOutcome:
    """What the strategy comes to; it fits."""
    outcome = apply_strategy(STRATEGIES[name], graph, budget_bytes=budget_bytes, time_limit_s=2.0)
    assert outcome.fits
    return outcome


@pytest.mark.parametrize(
    ("budget_bytes", "again"),
    [
        (7, []),
        (6, [1]),  # of one layer its input: a0 or a1
        (5, [1, 1]),  # of two: both
        (4, [1, 1, 2]),  # nothing but h1: h0 from a0 and c0, a1, and a0 once more
    ],
)
def test_three_layers_by_hand(budget_bytes: int, again: list[int]) -> None:
    """Thirteen operators: with everything saved there are seven bytes under the loss."""
    outcome = applied(layered(3), budget_bytes)
    assert sorted(outcome.schedule.recomputed().values()) == again
    assert outcome.cost_ns == 13 + sum(again)


def test_a_stage_saves_nothing_in_part() -> None:
    """A byte too few: rotor makes a and b of a layer again, with menus it is b alone."""
    graph = partly_saved(3)
    assert keep_all_peak_bytes(graph) == 14  # three times u and v; h2 and the gradient
    assert graph.base_cost_ns == 40
    outcome = applied(graph, 13)
    assert outcome.schedule.recomputed() == {0: 1, 1: 1}
    assert outcome.cost_ns == 40 + 11
    assert outcome.note.startswith("4 stages")  # three layers and the loss
    assert applied(graph, 13, "rotor_menus").cost_ns == 40 + 1


def test_without_blocks_the_chain_is_cut_where_it_can() -> None:
    """Each operator is a stage, so that of one layer b alone runs again."""
    outcome = applied(partly_saved(3, with_paths=False), 13)
    assert outcome.cost_ns == 40 + 1


def test_stages_that_the_chain_does_not_part() -> None:
    """Two of four are parted: they are taken. One of four: the finest chain is."""
    graph = unit_chain(8)
    g = graph_arrays(graph)
    finest = find_chain(g, turning_point(graph))
    assert finest is not None
    coarse = chain_of_stages(g, finest, [range(4), range(4, 8)])
    assert coarse.cuts == (0, 4, 8)
    gapped = replace(finest, cuts=(0, *finest.cuts[5:]))
    stages = [range(i, i + 2) for i in range(0, 8, 2)]
    assert chain_of_stages(g, gapped, stages).cuts == (0, 6, 8)
    assert chain_of_stages(g, replace(finest, cuts=(0, 7, 8)), stages).cuts == (0, 7, 8)


@pytest.mark.parametrize("num_layers", [3, 4, 5])
def test_stages_of_one_operator_are_solved_exactly(num_layers: int) -> None:
    """At every budget of equal layers the cost is the exhaustive optimum."""
    graph = training_chain(num_layers)
    for budget_bytes in range(30, 10 * (num_layers + 2), 10):
        assert applied(graph, budget_bytes).cost_ns == exhaustive_optimum(graph, budget_bytes)


@pytest.mark.parametrize("name", ["chain8h", "chain32h", "cm_vgg_unet", "gpt2_L12"])
@pytest.mark.parametrize("percent", [80, 50])
def test_menus_are_never_dearer(name: str, percent: int) -> None:
    """Everything and nothing are on every menu."""
    graph = load_instance(INSTANCES / f"{name}.json")
    budget_bytes = budget_of(graph, percent / 100)
    outcome = applied(graph, budget_bytes)
    assert graph.base_cost_ns < outcome.cost_ns
    assert applied(graph, budget_bytes, "rotor_menus").cost_ns <= outcome.cost_ns


@settings(max_examples=40, deadline=None)
@given(graph=cost_graphs(), share=st.integers(40, 100))
def test_schedules_of_any_graph_hold(graph: CostGraph, share: int) -> None:
    """Whatever the graph, there is a schedule that fits, or a reason."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    outcome = rotor(graph, budget_bytes)
    if outcome.schedule is None:
        assert outcome.reason
        return
    judged = replay(graph, outcome.schedule)
    assert (judged.peak_bytes, judged.cost_ns) == (outcome.peak_bytes, outcome.cost_ns)
    assert judged.peak_bytes <= budget_bytes


def test_says_why_there_is_no_schedule() -> None:
    """Too few bytes, no chain, and no budget."""
    with pytest.raises(StrategyError, match="no schedule of the chain fits"):
        apply_strategy(STRATEGIES["rotor"], unit_chain(6), budget_bytes=2)
    graph = load_instance(INSTANCES / "G1.json")
    with pytest.raises(StrategyError, match="not a chain"):
        apply_strategy(STRATEGIES["rotor"], graph, budget_bytes=budget_of(graph, 0.8))
    with pytest.raises(StrategyError, match="rotor needs a budget"):
        apply_strategy(STRATEGIES["rotor"], unit_chain(3))
