from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.backward_search import least_memory_bound
from solvers.instances import keep_all_peak_bytes, load_instance
from solvers.least_memory import needs_bytes
from solvers.replay import replay

from .brute_force import least_memory_exact
from .graphs import INSTANCES, cost_graphs, random_dag, random_step, training_chain

Family = Callable[[int], CostGraph]

families = st.sampled_from([random_dag, random_step])
seeds = st.integers(0, 10**6)
phases = (Phase.explicit, Phase.reuse, Phase.generate)


def check_bound(graph: CostGraph) -> None:
    """Alone it finds the least memory; told a peak it proves that or finds a lower one."""
    exact = least_memory_exact(graph)
    alone = least_memory_bound(graph)
    assert alone.proven
    assert alone.lower_bound_bytes == exact
    assert alone.schedule is not None
    assert replay(graph, alone.schedule).peak_bytes == exact
    told = least_memory_bound(graph, peak_bytes=exact)
    assert (told.lower_bound_bytes, told.schedule, told.proven) == (exact, None, True)
    told = least_memory_bound(graph, peak_bytes=exact + 1, lower_bound_bytes=exact)
    assert told.lower_bound_bytes == exact
    assert told.schedule is not None


@settings(max_examples=60, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_it_is_the_least_memory(family: Family, seed: int) -> None:
    """On small graphs it ends with the exact least memory and a schedule of it."""
    check_bound(family(seed))


@pytest.mark.slow
@settings(max_examples=600, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_it_is_the_least_memory_of_many(family: Family, seed: int) -> None:
    """The same on hundreds of graphs."""
    check_bound(family(seed))


@settings(max_examples=60, deadline=None, phases=phases)
@given(graph=cost_graphs())
def test_it_knows_everything_that_a_graph_can_say(graph: CostGraph) -> None:
    """Kept storages, pinned operators, workspaces and unread outputs included."""
    check_bound(graph)


@pytest.mark.parametrize("limit", [1, 3, 10, 30, 100, 300])
@pytest.mark.parametrize("seed", range(8))
def test_a_cut_search_bounds_from_below(
    limit: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the search is cut, its bound is no higher than the least memory."""
    monkeypatch.setattr("solvers.backward_search.FIRST_STATES", limit)
    monkeypatch.setattr("solvers.backward_search.MOST_STATES", limit)
    for family in (random_dag, random_step):
        graph = family(seed)
        exact = least_memory_exact(graph)
        bound = least_memory_bound(graph)
        assert bound.lower_bound_bytes <= exact
        assert not bound.proven or bound.lower_bound_bytes == exact


@pytest.mark.parametrize("num_layers", [2, 4, 6, 40])
def test_a_chain_needs_three_activations(num_layers: int) -> None:
    """b0 reads x0 and the gradient and makes another: three blocks suffice for any length."""
    bound = least_memory_bound(training_chain(num_layers))
    assert bound.proven
    assert bound.lower_bound_bytes == 30


def test_it_proves_more_than_what_each_operator_needs() -> None:
    """G1 needs 0.54 of its keep-all peak, though no operator needs more than 0.44."""
    graph = load_instance(INSTANCES / "G1.json")
    bound = least_memory_bound(graph, time_limit_s=60)
    assert bound.proven
    assert bound.lower_bound_bytes == 25_050
    assert bound.lower_bound_bytes > 1.2 * int(needs_bytes(graph_arrays(graph)).max())
    assert bound.lower_bound_bytes < 0.55 * keep_all_peak_bytes(graph)


def test_the_same_graph_gives_the_same_schedule() -> None:
    """Nothing is drawn at random."""
    graph = random_step(7)
    assert least_memory_bound(graph) == least_memory_bound(graph)


def test_no_time_proves_what_was_known() -> None:
    """Without time, or when it is stopped, the bound is the one that it was given."""
    stop = threading.Event()
    stop.set()
    for bound in (
        least_memory_bound(training_chain(4), lower_bound_bytes=12, time_limit_s=0),
        least_memory_bound(training_chain(4), lower_bound_bytes=12, stop=stop),
    ):
        assert (bound.lower_bound_bytes, bound.schedule, bound.proven) == (12, None, False)
