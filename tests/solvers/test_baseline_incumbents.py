"""The field's simple strategies as a source of incumbents."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.baseline_incumbents import (
    FAMILIES,
    SINGLE,
    BaselineSchedules,
)
from solvers.instances import budget_of, keep_all_peak_bytes
from solvers.replay import replay
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy

from .graphs import random_dag, random_step
from .strategy_graphs import transformer

SOLVING = {
    "auto",
    "rotor",
    "rotor_menus",
    "checkmate_milp",
    "checkmate_lp_rounding",
    "moccasin",
}
ELSEWHERE = {"none", "uniform_bytes"}
"""Which the portfolio tries by itself."""


def _always() -> bool:
    return True


def _never() -> bool:
    return False


def test_every_simple_strategy_is_among_them() -> None:
    """A strategy that is new in the registry and solves nothing must be added here."""
    names = {strategy.name for strategy in (*SINGLE, *FAMILIES)} | {"dtr"}
    assert names == set(STRATEGIES) - SOLVING - ELSEWHERE


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 10), st.booleans())
def test_ends_with_the_best_of_all(seed: int, tenths: int, is_step: bool) -> None:
    """The last schedule costs what the best of the strategies does, and all before cost more."""
    graph = random_step(seed) if is_step else random_dag(seed)
    budget_bytes = keep_all_peak_bytes(graph) * tenths // 10
    costs = []
    for name in sorted(set(STRATEGIES) - SOLVING - ELSEWHERE):
        try:
            outcome = apply_strategy(STRATEGIES[name], graph, budget_bytes=budget_bytes)
        except StrategyError:
            continue
        if outcome.fits:
            costs.append(outcome.cost_ns)
    baselines = BaselineSchedules(graph, budget_bytes)
    found = [*baselines.singles(_never), *baselines.families(_never)]
    replays = [replay(graph, schedule) for schedule, _ in found]
    assert all(r.peak_bytes <= budget_bytes for r in replays)
    assert [r.cost_ns for r in replays] == sorted({r.cost_ns for r in replays}, reverse=True)
    assert min(costs, default=None) == (replays[-1].cost_ns if replays else None)


def test_goes_on_where_the_effort_ended() -> None:
    """In many small portions as in one, and after the last nothing comes."""
    graph = transformer(4)
    budget_bytes = budget_of(graph, 0.8)
    whole = list(BaselineSchedules(graph, budget_bytes).families(_never))
    baselines = BaselineSchedules(graph, budget_bytes)
    portions = [found for _ in range(2000) for found in baselines.families(_never, effort_runs=1)]
    assert portions == whole
    assert whole
    assert list(baselines.families(_never)) == []


def test_dtr_that_was_cut_is_run_again() -> None:
    """Told to give up while DTR runs, the families begin with it."""
    graph = transformer(4)
    budget_bytes = budget_of(graph, 0.5)
    baselines = BaselineSchedules(graph, budget_bytes)
    assert [name for _, name in baselines.singles(_never)][-1] == "dtr"
    baselines = BaselineSchedules(graph, budget_bytes)
    asked = 0

    def give_up() -> bool:
        """Not before the strategies without a parameter, one question each, are through."""
        nonlocal asked
        asked += 1
        return asked > len(SINGLE) + 3

    assert "dtr" not in [name for _, name in baselines.singles(give_up)]
    assert next(baselines.families(_never))[1] == "dtr"


def test_gives_up_at_once() -> None:
    """Nothing is proposed when the time is over, and everything when it is asked for again."""
    graph = transformer(4)
    budget_bytes = budget_of(graph, 0.8)
    baselines = BaselineSchedules(graph, budget_bytes)
    assert [*baselines.singles(_always), *baselines.families(_always)] == []
    asked_once = BaselineSchedules(graph, budget_bytes)
    assert list(baselines.families(_never)) == list(asked_once.families(_never))


def test_dtr_says_that_it_was_told_to_give_up() -> None:
    """With the operator that it had come to."""
    from solvers.strategies.dtr import dtr

    graph = transformer(4)
    with pytest.raises(StrategyError, match="give up before operator 0"):
        dtr(graph, budget_of(graph, 0.5), give_up=_always)
