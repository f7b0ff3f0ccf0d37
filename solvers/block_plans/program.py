"""Choose a point for each block: least time, within the memory at every moment of the step.

One binary for each module and point. Each moment of the rest has a row: what is there
anyway, and what is saved by the blocks that have run forward and not yet backward; a
moment that stands for a block's forward or backward also has what that block needs while
it runs. The first blocks' bytes thus count in the most rows. Rows of the same blocks are
one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import pairwise

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

from ..highs import OBJECTIVE_SCALE, build_lp, quiet_highs, rounded_bound
from ..replay import replay
from ..schedule import Schedule
from .points import BlockPoints, Point
from .stepping import BlockedStep

SMALLEST_PART = 1e-6
"""Of a choice, from which a relaxed solution counts as having it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What may be chosen for a block, in the figures of :class:`~.points.Point`."""

    cost_ns: int
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    left_bytes: int
    shared: tuple[int, ...] = ()

    @classmethod
    def of(cls, point: Point) -> Choice:
        """Return a point's figures."""
        return cls(
            cost_ns=point.cost_ns,
            saved_bytes=point.saved_bytes,
            forward_bytes=point.forward_bytes,
            backward_bytes=point.backward_bytes,
            left_bytes=point.left_bytes,
            shared=point.shared,
        )


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
    used
        Of each distinct block, the choices that some module has, or has a bit of.
    """

    chosen: tuple[int, ...] | None
    bound_ns: int
    infeasible: bool
    used: Mapping[int, AbstractSet[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    there_bytes: int  # without the blocks
    waiting: tuple[int, ...]  # calls between forward and backward
    running: int | None  # the call that this moment stands for
    is_forward: bool
    gone: Mapping[int, Mapping[int, int]]  # call -> bytes that only it holds, by its storage
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
        at = {path: i for i, path in enumerate(step.paths)}
        self._module_of = [at[call.path] for call in step.calls]
        self._block_of = [0] * len(at)
        self._num_calls = [0] * len(at)
        for call, i in zip(step.calls, self._module_of, strict=True):
            self._block_of[i] = call.block
            self._num_calls[i] += 1
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
        relaxed: bool = False,
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
        relaxed
            Whether a module may have a bit of several choices: for bounds, in less time.
        """
        starts = [0]
        for b in self._block_of:
            starts.append(starts[-1] + len(choices[b]))
        columns = starts[-1]
        base_ns = max(1, self._step.whole.base_cost_ns)
        cost_ns = np.zeros(columns)
        shift = np.zeros(columns)
        least_ns = 0
        for i, b in enumerate(self._block_of):
            own = [self._num_calls[i] * c.cost_ns for c in choices[b]]
            cost_ns[starts[i] : starts[i + 1]] = own
            shift[starts[i] : starts[i + 1]] = min(own)
            least_ns += min(own)
        going = [row.going_bytes if inputs_may_go else 0 for row in self._rows]
        there = np.array([row.there_bytes for row in self._rows], dtype=np.float64) - going
        memory = self._memory(choices, starts)
        room = budget_bytes - there
        binding = np.maximum.reduceat(memory, starts[:-1], axis=1).sum(axis=1) > room
        memory, room = memory[binding], room[binding]
        model = _Model(
            cost=(cost_ns - shift) * OBJECTIVE_SCALE / base_ns,
            memory=memory / max(1, budget_bytes),
            room=room / max(1, budget_bytes),
            starts=np.array(starts),
        )
        found = model.relaxed(time_limit_s, seed)
        if not relaxed and found.shares is not None:
            allowed = gap * OBJECTIVE_SCALE
            rounded = model.rounded(found.shares)
            if rounded is not None and model.cost @ rounded <= found.bound + allowed:
                found = _Found(bound=found.bound, shares=rounded)
            else:
                found = model.integer(time_limit_s, seed, allowed, rounded)
        if found.infeasible:
            return Assignment(chosen=None, bound_ns=least_ns, infeasible=True)
        bound_ns = least_ns + rounded_bound(found.bound, base_ns)
        if found.shares is None:
            return Assignment(chosen=None, bound_ns=bound_ns, infeasible=False)
        parts = [found.shares[starts[i] : starts[i + 1]] for i in range(len(self._block_of))]
        used: dict[int, set[int]] = {b: set() for b in self._block_of}
        for b, part in zip(self._block_of, parts, strict=True):
            used[b].update(int(j) for j in np.flatnonzero(part > SMALLEST_PART))
        return Assignment(
            chosen=tuple(int(np.argmax(part)) for part in parts),
            bound_ns=bound_ns,
            infeasible=False,
            used=used,
        )

    def _memory(
        self, choices: Sequence[Sequence[Choice]], starts: Sequence[int]
    ) -> NDArray[np.float64]:
        """Bytes that each choice has at each moment."""
        memory = np.zeros((len(self._rows), starts[-1]))
        figures = [
            np.array([(c.saved_bytes, c.forward_bytes, *_ends(c)) for c in cs], dtype=np.float64)
            for cs in choices
        ]
        for r, row in enumerate(self._rows):
            for c in row.waiting:
                i, b = self._module_of[c], self._step.calls[c].block
                memory[r, starts[i] : starts[i + 1]] += figures[b][:, 0]
            for c, sizes in row.gone.items():
                i, b = self._module_of[c], self._step.calls[c].block
                memory[r, starts[i] : starts[i + 1]] += [
                    sum(sizes.get(k, 0) for k in choice.shared) for choice in choices[b]
                ]
            if row.running is not None:
                i, b = self._module_of[row.running], self._step.calls[row.running].block
                figure = 1 if row.is_forward else 3 if self._all_leave[row.running] else 2
                memory[r, starts[i] : starts[i + 1]] += figures[b][:, figure]
        return memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    bound: float = 0.0
    shares: NDArray[np.float64] | None = None  # of each column; None where none was found
    infeasible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """Minimal cost with one column of each module, all rows within their room."""

    cost: NDArray[np.float64]
    memory: NDArray[np.float64]
    room: NDArray[np.float64]
    starts: NDArray[np.int64]

    def relaxed(self, time_limit_s: float, seed: int) -> _Found:
        """Solve without integrality."""
        h = self._highs(time_limit_s, seed, integer=False)
        h.run()
        status = h.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return _Found(infeasible=True)
        if status != highspy.HighsModelStatus.kOptimal:
            return _Found()
        value = float(h.getInfo().objective_function_value)
        return _Found(bound=value, shares=np.array(h.getSolution().col_value))

    def rounded(self, shares: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Give each module the smallest of the columns that it has a share of, if that fits."""
        weight = self.memory.sum(axis=0) + np.where(shares > SMALLEST_PART, 0.0, np.inf)
        whole = np.zeros(len(self.cost))
        for begin, end in pairwise(self.starts):
            whole[begin + int(np.argmin(weight[begin:end]))] = 1.0
        return whole if np.all(self.memory @ whole <= self.room) else None

    def integer(
        self, time_limit_s: float, seed: int, gap: float, start: NDArray[np.float64] | None
    ) -> _Found:
        """Solve to a gap in units of the objective."""
        h = self._highs(time_limit_s, seed, integer=True)
        h.setOptionValue("mip_abs_gap", gap)
        h.setOptionValue("mip_rel_gap", 0.0)
        if start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = start
            solution.value_valid = True
            h.setSolution(solution)
        h.run()
        if h.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return _Found(infeasible=True)
        info = h.getInfo()
        is_found = info.primal_solution_status == 2
        return _Found(
            bound=float(info.mip_dual_bound),
            shares=np.array(h.getSolution().col_value) if is_found else None,
        )

    def _highs(self, time_limit_s: float, seed: int, *, integer: bool) -> highspy.Highs:
        rows, cols = np.nonzero(self.memory)
        num_rows, num_columns = self.memory.shape
        of_module = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        num_modules = len(self.starts) - 1
        ones = np.ones(num_columns)
        h = quiet_highs(time_limit_s=time_limit_s, seed=seed)
        h.passModel(
            build_lp(
                cost=self.cost,
                upper=ones,
                matrix=coo_array(
                    (
                        np.concatenate([self.memory[rows, cols], ones]),
                        (
                            np.concatenate([rows, num_rows + of_module]),
                            np.concatenate([cols, np.arange(num_columns)]),
                        ),
                    ),
                    shape=(num_rows + num_modules, num_columns),
                ),
                row_lower=np.concatenate([np.full(num_rows, -math.inf), np.ones(num_modules)]),
                row_upper=np.concatenate([self.room, np.ones(num_modules)]),
                integer=np.full(num_columns, integer),
            )
        )
        return h


def _ends(choice: Choice) -> tuple[int, int]:
    return choice.backward_bytes, choice.left_bytes


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
            sizes: dict[int, dict[int, int]] = {}
            for i, k in gone:
                outer = step.calls[i].outside[k]
                sizes.setdefault(i, {})[k] = rest.storages[outer].size_bytes
            found[key] = _Row(there_bytes, waiting, c, is_forward, sizes, going_bytes)
    return list(found.values())


def schedules_of(
    step: BlockedStep, points: Sequence[BlockPoints], chosen: Sequence[int]
) -> dict[str, Schedule]:
    """Return the schedule of each module, by the index of its point."""
    block_of = {call.path: call.block for call in step.calls}
    listed = [ps.points for ps in points]
    return {
        path: listed[block_of[path]][i].schedule for path, i in zip(step.paths, chosen, strict=True)
    }
