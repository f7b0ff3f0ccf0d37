"""The registry: built in, extended by copy, and the choice among candidates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graph_capture.cost_graph import CostGraph
from solvers.replay import InvalidScheduleError
from solvers.schedule import Schedule
from solvers.strategies import (
    STRATEGIES,
    StrategyError,
    apply_strategy,
    find_strategy,
    register_strategy,
    schedule_for_saved,
    solver_strategy,
)

from .strategy_graphs import unit_chain


def test_names_are_keys_and_everything_is_documented() -> None:
    """Every strategy says what it saves and where it is from."""
    for name, strategy in STRATEGIES.items():
        assert strategy.name == name
        assert strategy.summary
        assert strategy.source


def test_the_built_in_registry_cannot_be_changed() -> None:
    """It is a read-only mapping."""
    with pytest.raises(TypeError):
        STRATEGIES["mine"] = STRATEGIES["none"]  # type: ignore[index]


def test_a_function_becomes_a_strategy() -> None:
    """One schedule, or several of which the best within the budget is taken."""

    def save_every_second(graph: CostGraph, budget_bytes: int | None) -> Schedule:
        return schedule_for_saved(graph, saved=range(0, graph.num_operators // 2, 2))

    def sweep(graph: CostGraph, budget_bytes: int | None) -> Iterator[Schedule]:
        for step in (1, 2, 3):
            yield schedule_for_saved(graph, saved=range(0, graph.num_operators // 2, step))

    registry = register_strategy(sweep, register_strategy(save_every_second, name="second"))
    assert set(registry) == {*STRATEGIES, "second", "sweep"}
    assert "sweep" not in STRATEGIES
    graph = unit_chain(8)
    assert apply_strategy(registry["sweep"], graph, budget_bytes=9).cost_ns == 16
    assert apply_strategy(registry["second"], graph).cost_ns == 16 + 4
    assert apply_strategy(registry["sweep"], graph, budget_bytes=6).num_candidates == 3
    assert apply_strategy(registry["sweep"], graph).num_candidates == 1


def test_a_name_is_given_once() -> None:
    """A second strategy of a name is refused; under another name it is taken."""
    with pytest.raises(ValueError, match="there is a strategy 'none' already"):
        register_strategy(STRATEGIES["none"])
    renamed = register_strategy(STRATEGIES["none"], name="eager")
    assert renamed["eager"].name == "eager"
    assert find_strategy("eager", renamed).propose is STRATEGIES["none"].propose
    with pytest.raises(ValueError, match="unknown strategy 'magic'; known are none, uniform_sqrt"):
        find_strategy("magic")
    with pytest.raises(ValueError, match="did you mean 'uniform_sqrt'"):
        find_strategy("unifrm_sqrt")


def test_an_invalid_schedule_is_not_hidden() -> None:
    """The judge's error names what is wrong."""
    registry = register_strategy(lambda graph, budget: Schedule((1, 0)), name="wrong")
    with pytest.raises(InvalidScheduleError, match="before it is computed"):
        apply_strategy(registry["wrong"], unit_chain(3))


def test_a_strategy_without_candidates() -> None:
    """It says so by its name."""
    registry = register_strategy(lambda graph, budget: [], name="silent")
    with pytest.raises(StrategyError, match="silent proposed no schedule"):
        apply_strategy(registry["silent"], unit_chain(3))


def test_budgets_that_make_no_sense() -> None:
    """Negative ones, and none where one is needed."""
    with pytest.raises(ValueError, match="not negative, got -1"):
        apply_strategy(STRATEGIES["none"], unit_chain(3), budget_bytes=-1)
    with pytest.raises(StrategyError, match="auto needs a budget"):
        apply_strategy(STRATEGIES["auto"], unit_chain(3))


@pytest.mark.parametrize("name", ["auto", "rotor", "rotor_menus", "uniform_bytes"])
def test_solvers_are_strategies(name: str) -> None:
    """On eight layers in six bytes: a schedule that fits, ours the cheapest of all that fit."""
    graph = unit_chain(8)
    outcome = apply_strategy(STRATEGIES[name], graph, budget_bytes=6, time_limit_s=5.0)
    assert outcome.fits
    assert outcome.note
    if name == "auto":
        assert outcome.cost_ns == 16 + 3  # every schedule of eight layers in six bytes makes three


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkmate_milp", "checkmate_lp_rounding", "moccasin"])
def test_reference_solvers_are_strategies(name: str) -> None:
    """The exact models and the rounding, in their child process."""
    outcome = apply_strategy(STRATEGIES[name], unit_chain(8), budget_bytes=6, time_limit_s=20.0)
    assert outcome.fits
    assert outcome.cost_ns >= 16 + 3


def test_a_solver_that_finds_nothing_says_why() -> None:
    """Two bytes are less than any backward operator of two layers and its gradient need."""
    with pytest.raises(StrategyError, match="auto: proven: nothing fits in 2 bytes within 5 s"):
        apply_strategy(STRATEGIES["auto"], unit_chain(4), budget_bytes=2, time_limit_s=5.0)
    quick = solver_strategy("mine", "uniform", summary="s", source="t")
    with pytest.raises(StrategyError, match="mine: no schedule found"):
        apply_strategy(quick, unit_chain(4), budget_bytes=2)


@pytest.mark.parametrize("returned", [42, None, [1, 2], "all"])
def test_what_a_function_returns_must_be_schedules(returned: object) -> None:
    """Else the error names the function, what it returned and what to write."""

    def rubbish(graph: CostGraph, budget_bytes: int | None) -> Schedule:
        return returned  # type: ignore[return-value]

    registry = register_strategy(rubbish)
    with pytest.raises(TypeError, match=r"rubbish returned .* is no Schedule; schedule_for_saved"):
        apply_strategy(registry["rubbish"], unit_chain(3))
