"""Choose the strategies of a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from solvers.strategies.registry import (
    PlainStrategy,
    Registry,
    find_strategy,
    register_strategy,
)
from solvers.strategies.strategy import Candidate, Strategy, StrategyOptions

MIN_CUT = "min_cut"
_SOLVED = (
    "rotor",
    "rotor_menus",
    "checkmate_lp_rounding",
    "checkmate_milp",
    "moccasin",
    "auto",
)


def choose_strategies(
    strategies: Iterable[str | Strategy | PlainStrategy] | None, registry: Registry
) -> tuple[Registry, tuple[str, ...]]:
    """Return the registry with everything requested, and the requested names in its order.

    ``"min_cut"`` may be among them. It needs the captured step, so :func:`with_min_cut`
    makes its strategy; until then a stand-in holds its place.

    Parameters
    ----------
    strategies
        Names, strategies, or functions of a graph and a budget in bytes (or
        ``None``); ``None`` for everything in the registry.

    Raises
    ------
    ValueError
        When a name is unknown or taken.
    """
    known = registry if MIN_CUT in registry else _with_strategy(registry, _PLACEHOLDER)
    if strategies is None:
        return known, tuple(known)
    if isinstance(strategies, (str, Strategy)) or not isinstance(strategies, Iterable):
        raise ValueError(f"strategies is a sequence, got {strategies!r}: write [{strategies!r}]")
    wanted = set()
    for strategy in strategies:
        if isinstance(strategy, str):
            wanted.add(find_strategy(strategy, known).name)
        elif isinstance(strategy, Strategy) or callable(strategy):
            before = set(known)
            known = register_strategy(strategy, known)
            wanted |= set(known) - before
        else:
            raise ValueError(f"a strategy is a name, a Strategy or a function, got {strategy!r}")
    return known, tuple(name for name in known if name in wanted)


def with_min_cut(registry: Registry, captured: CapturedStep) -> Registry:
    """The registry with PyTorch's partitioner for this step in its place."""
    if registry.get(MIN_CUT) is not _PLACEHOLDER:
        return registry
    from .min_cut import min_cut_strategy  # loads the parts of torch that compile

    return MappingProxyType({**registry, MIN_CUT: min_cut_strategy(captured)})


def _no_captured_step(graph: CostGraph, options: StrategyOptions) -> list[Candidate]:
    raise RuntimeError("min_cut is asked about a captured step; see with_min_cut")


_PLACEHOLDER = Strategy(
    name=MIN_CUT,
    summary="what PyTorch's min-cut partitioner saves, at its memory budgets",
    source="torch._functorch.partitioners",
    propose=_no_captured_step,
)


def _with_strategy(registry: Registry, strategy: Strategy) -> Registry:
    """The registry with one more strategy, before those that solve."""
    names = list(registry)
    place = min((names.index(name) for name in _SOLVED if name in registry), default=len(names))
    names.insert(place, strategy.name)
    return MappingProxyType({name: registry.get(name, strategy) for name in names})
