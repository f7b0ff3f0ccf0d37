"""The field's rematerialization strategies, applied to one graph and judged by one replay.

``STRATEGIES`` maps names to strategies, :func:`apply_strategy` replays what one
proposes and takes the best within a budget, :func:`register_strategy` returns a
registry with one more. Does not depend on torch.
"""

from .blocks import Block, Blocks, find_blocks, module_blocks
from .registry import STRATEGIES, find_strategy, register_strategy
from .saved import saved_set_strategy, schedule_for_saved
from .segments import schedule_for_segments
from .solved import solver_strategy
from .strategy import (
    Candidate,
    Strategy,
    StrategyError,
    StrategyFailure,
    StrategyOptions,
    StrategyOutcome,
    apply_strategy,
)

__all__ = [
    "STRATEGIES",
    "Block",
    "Blocks",
    "Candidate",
    "Strategy",
    "StrategyError",
    "StrategyFailure",
    "StrategyOptions",
    "StrategyOutcome",
    "apply_strategy",
    "find_blocks",
    "find_strategy",
    "module_blocks",
    "register_strategy",
    "saved_set_strategy",
    "schedule_for_saved",
    "schedule_for_segments",
    "solver_strategy",
]
