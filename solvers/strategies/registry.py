"""The strategies by name. A registry is an immutable mapping; extending it makes a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from graph_capture.cost_graph import CostGraph
from graph_capture.suggestions import unknown_name

from ..schedule import Schedule
from .articulation import AP_GREEDY, AP_SQRT, LINEARIZED_GREEDY, LINEARIZED_SQRT
from .attention import MEGATRON_SELECTIVE
from .chen import CHEN_GREEDY
from .dtr import DTR
from .nested import CHEN_RECURSIVE, REVOLVE
from .policies import SAVE_MATMULS_PER_BLOCK, SAVE_ONLY_MATMULS
from .rotor import ROTOR
from .solved import (
    AUTO,
    CHECKMATE_LP_ROUNDING,
    CHECKMATE_MILP,
    MOCCASIN,
    ROTOR_MENUS,
    UNIFORM_BYTES,
)
from .strategy import Candidate, Strategy, StrategyOptions
from .uniform_segments import (
    MEGATRON_FULL_BLOCK,
    MEGATRON_FULL_UNIFORM,
    TRANSFORMERS_EVERY_N,
    TRANSFORMERS_PER_LAYER,
    UNIFORM_EVERY_K,
    UNIFORM_SQRT,
)

Registry = Mapping[str, Strategy]
PlainStrategy = Callable[[CostGraph, int | None], Schedule | Iterable[Schedule]]
"""A user's function: graph and budget in bytes (or ``None``) in, one schedule or several out."""


def _propose_none(graph: CostGraph, options: StrategyOptions) -> list[Candidate]:
    return [Candidate(schedule=Schedule.keep_all(graph))]


NONE = Strategy(
    name="none",
    summary="everything saved, nothing recomputed",
    source="eager PyTorch",
    propose=_propose_none,
)

STRATEGIES: Registry = MappingProxyType(
    {
        strategy.name: strategy
        for strategy in (
            NONE,
            UNIFORM_SQRT,
            UNIFORM_EVERY_K,
            UNIFORM_BYTES,
            CHEN_GREEDY,
            CHEN_RECURSIVE,
            REVOLVE,
            TRANSFORMERS_PER_LAYER,
            TRANSFORMERS_EVERY_N,
            MEGATRON_SELECTIVE,
            MEGATRON_FULL_UNIFORM,
            MEGATRON_FULL_BLOCK,
            SAVE_ONLY_MATMULS,
            SAVE_MATMULS_PER_BLOCK,
            AP_SQRT,
            AP_GREEDY,
            LINEARIZED_SQRT,
            LINEARIZED_GREEDY,
            DTR,
            ROTOR,
            ROTOR_MENUS,
            CHECKMATE_LP_ROUNDING,
            CHECKMATE_MILP,
            MOCCASIN,
            AUTO,
        )
    }
)
"""The built-in strategies, in the order in which a table shows them."""


def register_strategy(
    strategy: Strategy | PlainStrategy,
    registry: Registry = STRATEGIES,
    *,
    name: str | None = None,
    summary: str = "",
    source: str = "a user's function",
) -> Registry:
    """Return ``registry`` with one more strategy; the given one is unchanged.

    Parameters
    ----------
    strategy
        A :class:`Strategy`, or a function of a graph and a budget in bytes (or
        ``None``) that returns a schedule or several.
    name
        By default the strategy's, or the function's own.
    summary, source
        Of a function.

    Raises
    ------
    ValueError
        When the name is taken.

    Examples
    --------
    >>> from solvers.schedule import Schedule
    >>> def lazy(graph, budget_bytes):
    ...     return Schedule.keep_all(graph)
    >>> "lazy" in register_strategy(lazy), "lazy" in STRATEGIES
    (True, False)
    """
    if not isinstance(strategy, Strategy):
        strategy = _from_function(strategy, name or strategy.__name__, summary, source)
    elif name is not None:
        strategy = replace(strategy, name=name)
    if strategy.name in registry:
        raise ValueError(f"there is a strategy {strategy.name!r} already; choose another name")
    return MappingProxyType({**registry, strategy.name: strategy})


def find_strategy(name: str, registry: Registry = STRATEGIES) -> Strategy:
    """Return the strategy of that name.

    Raises
    ------
    ValueError
        When there is none; the message suggests the nearest and lists all.
    """
    if name not in registry:
        raise ValueError(unknown_name("strategy", name, registry))
    return registry[name]


def _from_function(function: PlainStrategy, name: str, summary: str, source: str) -> Strategy:
    def propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
        result = function(graph, options.budget_bytes)
        found = (result,) if isinstance(result, Schedule) else result
        for schedule in found if isinstance(found, Iterable) else (found,):
            if not isinstance(schedule, Schedule):
                raise TypeError(
                    f"{name} returned {schedule!r:.60}, which is no Schedule; "
                    "schedule_for_saved(graph, saved) makes one of what is saved"
                )
            yield Candidate(schedule=schedule)

    return Strategy(name=name, summary=summary, source=source, propose=propose)
