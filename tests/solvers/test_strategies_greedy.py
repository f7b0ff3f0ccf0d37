"""Chen's greedy plan and Checkmate's generalizations of it, counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.instances import load_instance
from solvers.replay import replay
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy
from solvers.strategies.articulation import articulation_points, every_sqrt, forward_operators
from solvers.strategies.chen import (
    EFFORT_RUNS,
    GRID,
    LEAST_PLANS,
    all_budgets,
    block_ends,
    chen_greedy,
    greedy_plan,
    paper_grid,
)
from solvers.strategies.strategy import StrategyOptions

from .graphs import INSTANCES
from .strategy_graphs import layered, transformer, unit_chain, with_paths


def test_algorithm_3_ends_a_segment_where_its_sum_exceeds_b() -> None:
    """Nine unit outputs, b = 2: the third of each three exceeds it."""
    plan = greedy_plan(unit_chain(9), range(9), 2)
    assert plan.saved == (2, 5, 8)
    assert (plan.saved_bytes, plan.segment_bytes) == (3, 3)


def test_only_candidates_end_segments() -> None:
    """With candidates 1, 4 and 7 the sums are 2, 3, 3; with b = 2 the first is not above it."""
    plan = greedy_plan(unit_chain(9), [1, 4, 7], 2)
    assert plan.saved == (4, 7)
    assert plan.segment_bytes == 5


def test_grid_of_the_appendix() -> None:
    """With b = 0 nine outputs are saved in segments of one: sqrt(9 · 1) = 3 is the middle."""
    grid = paper_grid(unit_chain(9), range(9))
    assert len(grid) == 6
    assert grid[0] == pytest.approx(3 / math.sqrt(2))
    assert grid[-1] == pytest.approx(3 * math.sqrt(2))


def test_greedy_on_nine_layers() -> None:
    """x2, x5, x8 are saved; the other six run again, each segment when it is reached."""
    graph = unit_chain(9)
    schedule = chen_greedy(graph, 2)
    forward = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert schedule.order == (*forward, 9, 6, 7, 10, 11, 12, 3, 4, 13, 14, 15, 0, 1, 16, 17)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 18 + 6
    assert outcome.peak_bytes == 6  # under b7: x2, x5, x6, x7 and two gradients


def test_the_sweep_takes_the_lowest_peak_without_a_budget() -> None:
    """All six values of the grid have a peak of 6; the smallest recomputes least here."""
    outcome = apply_strategy(STRATEGIES["chen_greedy"], unit_chain(9))
    assert (outcome.peak_bytes, outcome.cost_ns) == (6, 24)


def test_the_sweep_takes_the_cheapest_that_fits_a_budget() -> None:
    """At 9 bytes every second output may be saved: b = 1 recomputes four layers."""
    graph = unit_chain(9)
    assert chen_greedy(graph, 1).recomputed() == {0: 1, 2: 1, 4: 1, 6: 1, 8: 1}
    wide = apply_strategy(STRATEGIES["chen_greedy"], graph, budget_bytes=9)
    assert wide.fits
    assert wide.cost_ns < 24
    assert not apply_strategy(STRATEGIES["chen_greedy"], graph, budget_bytes=4).fits


def test_blocks_of_modules_end_at_their_last_operators() -> None:
    """c_i of each layer; within the plan u_i is never saved."""
    graph = layered(3)
    assert block_ends(graph) == [1, 3, 5]
    # Every layer's two bytes exceed 1, so h0, h1, h2 are saved; the loss's output
    # is fixed, and u2, u1, u0 are made again.
    assert chen_greedy(graph, 1).order == (*range(7), 4, 7, 8, 2, 9, 10, 0, 11, 12)


def test_articulation_points_of_a_chain_are_its_inner_operators() -> None:
    """The ends of a path cut nothing off."""
    assert articulation_points(unit_chain(9)) == [1, 2, 3, 4, 5, 6, 7]


def test_a_bypass_leaves_no_articulation_point_inside() -> None:
    """The residual runs around the attention, and a random state that hangs on it is no data."""
    names = [transformer(2).operators[v].name for v in articulation_points(transformer(2))]
    assert names == ["add0", "add1"]


def test_articulation_points_at_sqrt_n() -> None:
    """Seven points, every second: x2, x4, x6; x7 and x8 follow the last and stay."""
    graph = unit_chain(9)
    schedule = every_sqrt(graph, articulation_points(graph))
    tail = (9, 10, 11)
    assert schedule.order == (*range(9), *tail, 5, 12, 13, 3, 14, 15, 0, 1, 16, 17)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 18 + 4
    assert outcome.peak_bytes == 6  # under b8: x2, x4, x6, x7, x8 and its gradient


def test_linearized_sqrt_n() -> None:
    """Nine operators, every third: x2, x5, x8, the same as Chen's greedy at b = 2."""
    graph = unit_chain(9)
    assert forward_operators(graph) == list(range(9))
    assert every_sqrt(graph, forward_operators(graph)) == chen_greedy(graph, 2)


def _orders(name: str, graph: CostGraph, budget_bytes: int) -> dict[str, tuple[int, ...]]:
    options = StrategyOptions(budget_bytes=budget_bytes)
    return {c.setting: c.schedule.order for c in STRATEGIES[name].propose(graph, options)}


def test_checkmates_greedy_keeps_what_follows_the_last_saved() -> None:
    """b = 3 saves x3 and x7; x8 stays for b8, and six operators run again.

    Chen's Algorithm 2 makes x8 again, too.
    """
    graph = unit_chain(9)
    tail = (9, 10, 4, 5, 6, 11, 12, 13, 14, 0, 1, 2, 15, 16, 17)
    assert _orders("linearized_greedy", graph, 9)["b=3"] == (*range(9), *tail)
    assert chen_greedy(graph, 3).order == (*range(9), 8, *tail)


def test_checkmates_greedy_without_a_segment_recomputes_nothing() -> None:
    """A b that no sum exceeds saves nothing and keeps all; Chen's runs all again."""
    graph = unit_chain(9)
    assert _orders("linearized_greedy", graph, 9)["b=9"] == tuple(range(18))
    assert _orders("ap_greedy", graph, 9)["b=8"] == tuple(range(18))
    assert chen_greedy(graph, 9).recomputed() == dict.fromkeys(range(9), 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12))
def test_all_plans_are_found(outputs: list[tuple[int, bool]]) -> None:
    """Every b from nothing to the sum of all sizes gives one of the plans, and each is another."""
    operators = tuple(Operator(name=f"f{v}", outputs=(v,)) for v in range(len(outputs)))
    graph = CostGraph(
        (*operators, Operator(name="b", phase="backward")),
        tuple(
            Storage(name=f"x{v}", size_bytes=size, producer=v)
            for v, (size, _) in enumerate(outputs)
        ),
    )
    may_end = [v for v, (_, is_candidate) in enumerate(outputs) if is_candidate]
    every_b = range(sum(size for size, _ in outputs) + 1)
    found = [greedy_plan(graph, may_end, b).saved for b in all_budgets(graph, may_end)]
    assert len(found) == len(set(found))
    assert set(found) == {greedy_plan(graph, may_end, b).saved for b in every_b}


def test_all_plans_are_tried_for_a_budget() -> None:
    """Sixty forward operators of different sizes make 224 plans."""
    graph = load_instance(INSTANCES / "G1.json")
    outcome = apply_strategy(STRATEGIES["linearized_greedy"], graph, budget_bytes=1)
    num_plans = len(list(all_budgets(graph, forward_operators(graph))))
    assert outcome.num_candidates == num_plans == 224


def test_fewer_plans_are_tried_on_large_graphs() -> None:
    """With eight thousand operators, of different sizes, little more than the least number."""
    chain = unit_chain(4000)
    graph = CostGraph(
        chain.operators,
        tuple(replace(s, size_bytes=1 + 7919 * k % 101) for k, s in enumerate(chain.storages)),
    )
    assert EFFORT_RUNS // graph.num_operators < LEAST_PLANS
    options = StrategyOptions(budget_bytes=1)
    num_candidates = sum(1 for _ in STRATEGIES["linearized_greedy"].propose(graph, options))
    assert 10 < num_candidates <= LEAST_PLANS + 1 + GRID


def test_no_articulation_points() -> None:
    """A square falls apart nowhere; the error says so."""
    storages = tuple(Storage(name=f"x{v}", size_bytes=1, producer=v) for v in range(5))
    square = CostGraph(
        (
            Operator(name="a", outputs=(0,)),
            Operator(name="b", inputs=(0,), outputs=(1,)),
            Operator(name="c", inputs=(0,), outputs=(2,)),
            Operator(name="d", inputs=(1, 2), outputs=(3,)),
            Operator(name="back", inputs=(3,), outputs=(4,), phase="backward"),
        ),
        storages,
    )
    with pytest.raises(StrategyError, match="no articulation points"):
        apply_strategy(STRATEGIES["ap_sqrt"], square)


def test_nothing_to_divide() -> None:
    """One forward operator makes no segments."""
    with pytest.raises(StrategyError, match="1 forward operators"):
        apply_strategy(STRATEGIES["chen_greedy"], unit_chain(1))
    assert with_paths(["a", "b"]).num_operators == 4
