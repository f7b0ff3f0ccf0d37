"""Choose a point for each block: least time, within the memory at every moment of the step.

One binary for each module and point. Each moment of the rest has a row: what is there
anyway, and what is saved by the blocks that have run forward and not yet backward; a
moment that stands for a block's forward or backward also has what that block needs while
it runs. The first blocks' bytes thus count in the most rows. Rows of the same blocks are
one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import highspy
import numpy as np
from scipy.sparse import coo_array

from ..highs import OBJECTIVE_SCALE, build_lp, quiet_highs, rounded_bound
from ..replay import replay
from ..schedule import Schedule
from .stepping import BlockedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What may be chosen for a block, in the figures of :class:`~.points.Point`."""

    cost_ns: int
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    left_bytes: int
    shared: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The program's answer.

    Parameters
    ----------
    chosen
        Index of the choice of each module, in the order of ``BlockedStep.paths``;
        ``None`` where there is none within the budget, or none was found.
    bound_ns
        No choice takes less time in the blocks.
    infeasible
        Whether there is provably none.
    """

    chosen: tuple[int, ...] | None
    bound_ns: int
    infeasible: bool


@dataclass(frozen=True)
class _Row:
    there_bytes: int  # without the blocks
    waiting: tuple[int, ...]  # calls between forward and backward
    running: int | None  # the call that this moment stands for
    is_forward: bool
    gone: tuple[tuple[int, int], ...]  # (call, storage of its block) that only the block holds
    going_bytes: int  # what dies here, perhaps before the block's fullest moment


class Program:
    """The moments of a step, ready to be solved for several sets of choices.

    Parameters
    ----------
    step
        The step.
    """

    def __init__(self, step: BlockedStep) -> None:
        self._step = step
        self._module_of = [step.paths.index(call.path) for call in step.calls]
        self._rows = _rows(step)
        self._all_leave = [
            step.leaving_with(call) == step.leaving(call.block) for call in step.calls
        ]

    def solve(
        self,
        choices: Sequence[Sequence[Choice]],
        budget_bytes: int,
        *,
        time_limit_s: float,
        seed: int = 0,
        gap: float = 1e-4,
        inputs_may_go: bool = False,
    ) -> Assignment:
        """Choose for each block.

        Parameters
        ----------
        choices
            Those of each distinct block.
        gap
            In parts of the step's time.
        inputs_may_go
            Whether what a block reads last may be gone at its fullest moment: for bounds.
        """
        step = self._step
        block_of = {call.path: call.block for call in step.calls}
        offsets, columns = [], 0
        for path in step.paths:
            offsets.append(columns)
            columns += len(choices[block_of[path]])
        base_ns = max(1, step.whole.base_cost_ns)
        num_calls = {path: sum(call.path == path for call in step.calls) for path in step.paths}
        cost_ns = np.array(
            [num_calls[p] * c.cost_ns for p in step.paths for c in choices[block_of[p]]],
            dtype=np.float64,
        )
        least_ns = sum(
            num_calls[p] * min(c.cost_ns for c in choices[block_of[p]]) for p in step.paths
        )
        rows: list[int] = []
        cols: list[int] = []
        values: list[float] = []
        lower: list[float] = []
        upper: list[float] = []
        scale = 1.0 / max(1, budget_bytes)
        for row in self._rows:
            entries = self._entries(row, choices, offsets)
            rows += [len(upper)] * len(entries)
            cols += list(entries)
            values += [value * scale for value in entries.values()]
            lower.append(-math.inf)
            there_bytes = row.there_bytes - (row.going_bytes if inputs_may_go else 0)
            upper.append((budget_bytes - there_bytes) * scale)
        for i, path in enumerate(step.paths):
            num = len(choices[block_of[path]])
            rows += [len(upper)] * num
            cols += range(offsets[i], offsets[i] + num)
            values += [1.0] * num
            lower.append(1.0)
            upper.append(1.0)
        starts = [*offsets, columns]
        shift = np.concatenate(
            [
                np.full(starts[i + 1] - starts[i], cost_ns[starts[i] : starts[i + 1]].min())
                for i in range(len(offsets))
            ]
        )
        h = quiet_highs(time_limit_s=time_limit_s, seed=seed)
        h.setOptionValue("mip_abs_gap", gap * OBJECTIVE_SCALE)
        h.setOptionValue("mip_rel_gap", 0.0)
        h.passModel(
            build_lp(
                cost=(cost_ns - shift) * OBJECTIVE_SCALE / base_ns,
                upper=np.ones(columns),
                matrix=coo_array((values, (rows, cols)), shape=(len(upper), columns)),
                row_lower=np.array(lower),
                row_upper=np.array(upper),
                integer=np.ones(columns, dtype=bool),
            )
        )
        h.run()
        status = h.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return Assignment(chosen=None, bound_ns=least_ns, infeasible=True)
        info = h.getInfo()
        bound_ns = least_ns + rounded_bound(float(info.mip_dual_bound), base_ns)
        if info.primal_solution_status != 2:  # none found
            return Assignment(chosen=None, bound_ns=bound_ns, infeasible=False)
        x = np.array(h.getSolution().col_value)
        chosen = tuple(int(np.argmax(x[starts[i] : starts[i + 1]])) for i in range(len(step.paths)))
        return Assignment(chosen=chosen, bound_ns=bound_ns, infeasible=False)

    def _gone_bytes(self, row: _Row, c: int) -> dict[int, int]:
        """Bytes of what only a waiting block holds, by the block's storage."""
        outside, storages = self._step.calls[c].outside, self._step.rest.storages
        return {k: storages[outside[k]].size_bytes for call, k in row.gone if call == c}

    def _entries(
        self, row: _Row, choices: Sequence[Sequence[Choice]], offsets: Sequence[int]
    ) -> dict[int, int]:
        entries: dict[int, int] = {}

        def add(c: int, bytes_of: Callable[[Choice], int]) -> None:
            at = offsets[self._module_of[c]]
            for i, choice in enumerate(choices[self._step.calls[c].block]):
                entries[at + i] = entries.get(at + i, 0) + bytes_of(choice)

        for c in row.waiting:
            add(c, partial(_saved_bytes, sizes=self._gone_bytes(row, c)))
        if row.running is not None:
            if row.is_forward:
                add(row.running, lambda choice: choice.forward_bytes)
            else:
                all_leave = self._all_leave[row.running]
                add(row.running, _LEFT_BYTES if all_leave else _BACKWARD_BYTES)
        return {column: value for column, value in entries.items() if value}


_BACKWARD_BYTES = attrgetter("backward_bytes")
_LEFT_BYTES = attrgetter("left_bytes")


def _saved_bytes(choice: Choice, sizes: Mapping[int, int]) -> int:
    return choice.saved_bytes + sum(sizes.get(k, 0) for k in choice.shared)


def _rows(step: BlockedStep) -> list[_Row]:
    """The moments that differ, each at its fullest."""
    rest = step.rest
    outcome = replay(rest, Schedule.keep_all(rest))
    last_of = {k: last for k, _, last in outcome.live}  # in base order each has one version
    running = {call.forward: (c, True) for c, call in enumerate(step.calls)}
    running |= {call.backward: (c, False) for c, call in enumerate(step.calls)}
    found: dict[tuple[object, ...], _Row] = {}
    for v, there_bytes in enumerate(outcome.memory_bytes):
        c, is_forward = running.get(v, (None, False))
        waiting = tuple(i for i, call in enumerate(step.calls) if call.forward < v < call.backward)
        gone = tuple(
            (i, k)
            for i in waiting
            for k, outer in step.calls[i].outside.items()
            if last_of.get(outer, v) < v
        )
        going_bytes = 0
        if c is not None:
            read = set(rest.operators[v].inputs)
            going_bytes = sum(rest.storages[k].size_bytes for k in read if last_of.get(k) == v)
        key = (waiting, c, is_forward, gone)
        if key not in found or there_bytes > found[key].there_bytes:
            found[key] = _Row(there_bytes, waiting, c, is_forward, gone, going_bytes)
    return list(found.values())
