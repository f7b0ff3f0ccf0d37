"""The peer that chooses modules by an integer program: ``torch.distributed._tools.sac_ilp``.

PyTorch has this program and imports it nowhere. For each module it decides whether to recompute
it, and how much of its memory to discard then (``sac_milp``); for each chosen module, which
operators to save (``get_optimal_checkpointing_policy_per_module``). Both run as they are, at
their own gap of 5 % and limits of 180 s and 10 s, with PuLP's CBC. What they decide runs by
``torch.utils.checkpoint`` with selective contexts, the way it is meant.

Its budget counts parameters, their gradients as they are made, and what forward and backward
make. It knows nothing of all else that is on the device during a step: buffers, the input, the
optimizer's state, gradients from earlier steps, what the loop holds. Their bytes are taken off
the budget before it is asked.

Known to be inexact
-------------------
The peak that it believes in is a sum over modules. What a module's recomputation holds beside
what comes back for its backward pass is not in it, nor are gradients that are made within the
module; a module's own activations and their gradients are counted as if all were there at once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from graph_capture.costs.resolve import resolve_cost_model
from graph_capture.costs.target import target_of
from graph_capture.private_torch.module_program import module_program, never_counted
from graph_capture.units import format_bytes
from solvers.strategies.strategy import StrategyError, StrategyFailure

from .checkpointing import without_cache
from .module_statistics import module_figures
from .peer import Ready, Situation

GIB = 2**30

_STEP_PERCENT = 5


@contextmanager
def by_module_program(model: nn.Module, situation: Situation) -> Iterator[Ready]:
    """Let PyTorch's integer program choose modules, and wrap these in selective checkpoints.

    Raises
    ------
    ImportError
        When PuLP is not installed.
    StrategyError
        When there is no budget, or the program finds nothing within it.
    """
    budget_bytes = situation.budget_bytes
    if importlib.util.find_spec("pulp") is None:
        raise ImportError(
            'the program of torch.distributed._tools.sac_ilp needs PuLP: pip install "remat-planner'
            '[peers]"'
        )
    if budget_bytes is None:
        raise StrategyError("it needs a budget: give, for example, budgets=['60%']")
    note = without_cache(model)
    costs = resolve_cost_model(situation.cost_model, target_of(model, []))
    with _quiet():
        figures = module_figures(model, situation.sample_input, situation.loss_fn, costs)
    program = module_program()
    beside_bytes = situation.beside_bytes
    own_bytes = budget_bytes - beside_bytes
    with _quiet():
        discarded, _, believed = program.sac_milp(figures.graph, own_bytes / GIB)
    if believed < 0:
        raise StrategyError(
            f"its program finds nothing within {format_bytes(own_bytes)} ({own_bytes} bytes): the "
            f"budget without the {format_bytes(beside_bytes)} that it does not count",
            StrategyFailure.NOTHING_FOUND,
        )
    chosen: dict[Any, _Saved] = {}
    less = []
    for name, share in discarded.items():
        stats = figures.operators[name]
        key = share, str(stats)
        if key not in chosen:
            chosen[key] = _saved_of(program, stats, share, name)
        if chosen[key].less:
            less.append(f"{figures.paths[name]} cannot discard {share:.0%}: {chosen[key].less}")
        module = model.get_submodule(figures.paths[name])
        # Hooks of the module stay outside, as those of blocks in the other peers.
        module.forward = functools.partial(
            checkpoint,
            module.forward,
            use_reentrant=False,
            context_fn=_Contexts(name, stats.func_names, chosen[key].operators),
        )
    believed_bytes = believed + beside_bytes
    notes = (f"its program believes in {format_bytes(believed_bytes)}", *less, note)
    yield Ready(
        model=model,
        setting=f"{format_bytes(budget_bytes)}, {len(discarded)} modules",
        note="; ".join(filter(None, notes)),
    )


@dataclass(frozen=True, slots=True)
class _Saved:
    """Which operators of a module are saved; ``less`` says how much less is discarded."""

    operators: tuple[bool, ...]
    less: str = ""


def _saved_of(program: Any, stats: Any, share: float, name: str) -> _Saved:
    """What its program for one module saves to discard a share of the memory.

    The program over modules does not know what this one must save, such as random draws of a
    module without a tensor among its positional arguments. Then as much is discarded as it can.
    """
    for percent in range(0, 101, _STEP_PERCENT):
        room = min(1.0, max(0.0, 1.0 - share) + percent / 100)
        with _quiet():
            found = program.get_optimal_checkpointing_policy_per_module(stats, room)
        if len(found) == len(stats.func_names):
            return _Saved(tuple(map(bool, found)), f"{1 - room:.0%} at most" if percent else "")
        if room == 1.0:
            break
    raise StrategyError(
        f"its program for the operators of {name} finds nothing that it may save",
        StrategyFailure.NOTHING_FOUND,
    )


class _Contexts:
    """Makes the contexts of one call of a module, in which operators are told apart by number.

    Parameters
    ----------
    name
        Of the module, for messages.
    calls
        The operators that the statistics saw, in order.
    saved
        Which of them are saved.
    """

    def __init__(self, name: str, calls: Sequence[str], saved: Sequence[bool]) -> None:
        self._name, self._calls, self._saved = name, tuple(calls), tuple(saved)
        self._ignored = never_counted()

    def __call__(self) -> Any:
        # Calls that write to a saved result are saved with it, all or none, so that what is taken
        # from the cache is what the last of them left.
        return create_selective_checkpoint_contexts(self._policy(), allow_cache_entry_mutation=True)

    def _policy(self) -> Callable[..., CheckpointPolicy]:
        so_far = {False: 0, True: 0}  # PyTorch before 2.13 asks again when it recomputes

        def policy(context: Any, call: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
            if call in self._ignored:
                return CheckpointPolicy.PREFER_RECOMPUTE
            number = so_far[context.is_recompute]
            called = call.overloadpacket.__name__
            so_far[context.is_recompute] += 1
            if number >= len(self._calls) or called != self._calls[number]:
                seen = self._calls[number] if number < len(self._calls) else "its end"
                raise RuntimeError(
                    f"{self._name} calls {called} where its statistics saw {seen}: this step takes "
                    "another path than the one that they saw, and what was chosen cannot be applied"
                )
            saved = self._saved[number]
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        return policy


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep messages of the trackers, the program and PuLP back, as those of other peers."""
    logger = logging.getLogger("torch.distributed._tools.sac_ilp")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
