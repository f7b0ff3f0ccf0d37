"""What a block can trade: bytes saved across the turn, bytes in its backward, extra time.

A block's own peak says little about a step of many: what it saves from its forward to its
backward adds up over all blocks, what it needs while it runs does not. So its schedules are
sought with the saved bytes as the constraint: the turn, at which a block waits for all
others, gets so much scratch that just these bytes fit beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graph_capture.cost_graph import CostGraph

from ..least_memory import least_memory
from ..portfolio import solve
from ..replay import replay
from ..result import OPTIMAL_GAP, SolveResult, SolveStatus
from ..schedule import Schedule
from .stepping import Block

UNLIMITED = 2**60
"""Bytes of a limit that limits nothing."""

QUICK_S, QUICK_SHARE = 1.0, 0.3
"""Of a solve, for slice refinement alone: without the searches beside it, it solves most blocks.

A LLaMA layer of 91 operators takes it 0.02 to 0.07 s, everything together 0.3 to 0.9 s.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A block's schedule, as the rest of the step sees it.

    Parameters
    ----------
    schedule
        Of the block's graph.
    cost_ns
        Time of its forward and backward.
    saved_bytes
        Of its own, alive from forward to backward.
    shared
        Its inputs and outputs that its backward reads, which somebody else may hold as well.
    forward_bytes, backward_bytes
        The most that its forward (backward) has beyond what was there before and all that
        the rest says it makes; may be negative.
    left_bytes
        As ``backward_bytes``, where the inputs that leave do so within the backward.
    peak_bytes
        The most at any moment of its own, outputs and tangents included.
    """

    schedule: Schedule
    cost_ns: int
    saved_bytes: int
    shared: tuple[int, ...]
    forward_bytes: int
    backward_bytes: int
    left_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What a solve under two limits has found.

    Parameters
    ----------
    saved_limit, peak_limit
        The limits in bytes.
    bound_ns
        No schedule within the limits takes less time.
    point
        The schedule; ``None`` where there is none.
    proven
        Whether there is provably none.
    """

    saved_limit: int
    peak_limit: int
    bound_ns: int
    point: Point | None
    proven: bool = False


class BlockPoints:
    """The points of one block, solved as they are asked for.

    Parameters
    ----------
    block
        The block.
    inputs, outputs, tangents
        Its storages that others make for its forward, that others read, and that others make
        for its backward.
    leaving
        Those of the inputs that nobody reads after its backward, see
        :meth:`~.stepping.BlockedStep.leaving`.
    seed
        For the searches.
    """

    def __init__(
        self,
        block: Block,
        *,
        inputs: frozenset[int],
        outputs: frozenset[int],
        tangents: frozenset[int],
        leaving: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> None:
        self.block = block
        self._inputs, self._outputs, self._tangents = inputs, outputs, tangents
        self._leaving, self._seed = leaving, seed
        self.graph = _bare(block.graph, outputs | tangents)
        self.solved: dict[tuple[int, int], Solved] = {}

    @cached_property
    def keep_all(self) -> Point:
        """The block's schedule that repeats nothing."""
        return self.measured(Schedule.keep_all(self.graph))

    @property
    def points(self) -> list[Point]:
        """All that were found, none of which another one is as good as in every respect."""
        found = [self.keep_all, *(s.point for s in self.solved.values() if s.point is not None)]
        kept: list[Point] = []
        for point in sorted(found, key=_figures):
            if not any(_as_good(other, point) for other in kept):
                kept.append(point)
        return kept

    def measured(self, schedule: Schedule) -> Point:
        """Return a schedule's figures."""
        outcome = replay(self.graph, schedule)
        at = schedule.order.index(self.block.turn)
        sizes = [s.size_bytes for s in self.graph.storages]
        across = [k for k, born, last in outcome.live if born < at < last]
        apart = self._outputs | self._tangents
        made = sum(sizes[k] for k in self._outputs)
        returned = sum(sizes[k] for k in self._tangents) + sum(
            s.size_bytes for s in self.graph.storages if s.kept
        )
        memory = outcome.memory_bytes
        return Point(
            schedule=schedule,
            cost_ns=outcome.cost_ns,
            saved_bytes=sum(sizes[k] for k in across if k not in apart),
            shared=tuple(sorted({*(self._outputs & set(across)), *self._read_after(schedule, at)})),
            forward_bytes=max(memory[:at], default=0) - made,
            backward_bytes=max(memory[at + 1 :], default=0) - returned,
            left_bytes=self._left_bytes(schedule, memory, at) - returned,
            peak_bytes=max(*memory[:at], *memory[at + 1 :], 0),
        )

    def _left_bytes(self, schedule: Schedule, memory: Sequence[int], at: int) -> int:
        """The most after the turn, less the inputs that are gone by then.

        A call holds its inputs until its backward begins.
        """
        order, operators = schedule.order, self.graph.operators
        begins = order.index(self.block.turn + 1, at) if at + 1 < len(order) else at
        gone = [0] * (len(order) + 1)
        for k in self._leaving:
            reads = (i for i in range(at + 1, len(order)) if k in operators[order[i]].inputs)
            last = max(begins, *reads, begins)
            gone[last + 1] += self.block.graph.storages[k].size_bytes
        most, left = 0, 0
        for i in range(at + 1, len(order)):
            left += gone[i]
            most = max(most, memory[i] - left)
        return most

    def _read_after(self, schedule: Schedule, at: int) -> set[int]:
        read: set[int] = set()
        for v in schedule.order[at + 1 :]:
            read.update(self.graph.operators[v].inputs)
        return read & self._inputs

    def solve(
        self, saved_limit: int, peak_limit: int = UNLIMITED, *, time_limit_s: float, gap: float
    ) -> Solved:
        """Find the fastest schedule that saves and needs no more, once."""
        key = saved_limit, peak_limit
        if key not in self.solved:
            self.solved[key] = self._solve(saved_limit, peak_limit, time_limit_s, gap)
        return self.solved[key]

    def _solve(self, saved_limit: int, peak_limit: int, time_limit_s: float, gap: float) -> Solved:
        budget_bytes = min(peak_limit, self._all_bytes)
        graph = self._with_turn(max(0, budget_bytes - saved_limit - self._turn_bytes))
        begin_s = time.monotonic()
        found = solve(
            graph,
            budget_bytes,
            solver="slice_refinement",
            time_limit_s=min(QUICK_S, QUICK_SHARE * time_limit_s),
            seed=self._seed,
            gap=gap,
        )
        result = found
        if not _is_settled(found, gap):
            result = solve(
                graph,
                budget_bytes,
                time_limit_s=max(0.0, time_limit_s - (time.monotonic() - begin_s)),
                seed=self._seed,
                hint=found.schedule,
                gap=gap,
            )
        return Solved(
            saved_limit=saved_limit,
            peak_limit=peak_limit,
            bound_ns=max(result.global_bound_ns, found.global_bound_ns),
            point=None if result.schedule is None else self.measured(result.schedule),
            proven=result.status is SolveStatus.INFEASIBLE and not result.staged_infeasible,
        )

    @cached_property
    def repeat_all(self) -> Point:
        """The schedule of ``torch.utils.checkpoint``: all of forward again, then backward.

        It saves only what cannot be made again.
        """
        operators, turn = self.graph.operators, self.block.turn
        needed: set[int] = set()
        for v in range(turn + 1, len(operators)):
            needed.update(operators[v].inputs)
        again: list[int] = []
        for v in reversed(range(turn)):
            op = operators[v]
            if op.pinned is None and needed.intersection(op.outputs):
                again.append(v)
                needed.update(op.inputs)
        after = range(turn + 1, len(operators))
        return self._noted(Schedule((*range(turn + 1), *reversed(again), *after)))

    def least_peak(self, *, time_limit_s: float) -> Point:
        """Return the schedule that needs least while it runs."""
        found = least_memory(self._with_turn(0), time_limit_s=time_limit_s, seed=self._seed)
        return self._noted(found.schedule)

    def _noted(self, schedule: Schedule) -> Point:
        point = self.measured(schedule)
        key = point.saved_bytes, point.peak_bytes
        if key not in self.solved:
            self.solved[key] = Solved(
                saved_limit=key[0],
                peak_limit=key[1],
                bound_ns=self.graph.base_cost_ns,
                point=point,
            )
        return point

    def bound_ns(self, saved_limit: int) -> int | None:
        """No schedule that saves no more takes less time; ``None`` where there is none."""
        known = [s for s in self.solved.values() if s.saved_limit >= saved_limit]
        if any(s.proven and s.peak_limit >= UNLIMITED for s in known):
            return None
        least = self.graph.base_cost_ns
        return max(
            (s.bound_ns for s in known if s.peak_limit >= UNLIMITED and not s.proven), default=least
        )

    @cached_property
    def least_backward_bytes(self) -> int:
        """No schedule's backward needs less: each operator needs what it reads and makes."""
        returned = sum(self.graph.storages[k].size_bytes for k in self._tangents) + sum(
            s.size_bytes for s in self.graph.storages if s.kept
        )
        after = range(self.block.turn + 1, self.graph.num_operators)
        return max((self.graph.working_set_bytes(v) for v in after), default=0) - returned

    @cached_property
    def least_forward_bytes(self) -> int:
        """No schedule's forward needs less."""
        made = sum(self.graph.storages[k].size_bytes for k in self._outputs)
        before = range(self.block.turn)
        return max((self.graph.working_set_bytes(v) for v in before), default=0) - made

    @cached_property
    def _turn_bytes(self) -> int:
        """What others hold while the block waits: its outputs, tangents, what the turn makes."""
        made = {*self._outputs, *self.graph.operators[self.block.turn].outputs}
        return sum(self.graph.storages[k].size_bytes for k in made)

    @cached_property
    def _all_bytes(self) -> int:
        """More than any schedule of the block needs."""
        num_bytes = sum(s.size_bytes for s in self.graph.storages)
        return 2 * num_bytes + max((op.workspace_bytes for op in self.graph.operators), default=0)

    def _with_turn(self, scratch_bytes: int) -> CostGraph:
        operators = list(self.graph.operators)
        turn = operators[self.block.turn]
        operators[self.block.turn] = replace(turn, workspace_bytes=scratch_bytes)
        return CostGraph(tuple(operators), self.graph.storages)


def _bare(graph: CostGraph, handed_on: frozenset[int]) -> CostGraph:
    """The graph without what others hold: nothing is resident, and outputs may go."""
    storages = []
    for k, storage in enumerate(graph.storages):
        if storage.producer is None:
            storage = replace(storage, size_bytes=0)
        if k in handed_on:
            storage = replace(storage, kept=False)
        storages.append(storage)
    return CostGraph(graph.operators, tuple(storages))


def _is_settled(result: SolveResult, gap: float) -> bool:
    """Whether more of the search would bring nothing."""
    if result.cost_ns is None:
        return result.status is SolveStatus.INFEASIBLE and not result.staged_infeasible
    return result.cost_ns <= result.global_bound_ns * (1 + max(gap, OPTIMAL_GAP))


def _figures(point: Point) -> tuple[int, int, int, int]:
    return point.cost_ns, point.saved_bytes, point.backward_bytes, point.forward_bytes


def _as_good(a: Point, b: Point) -> bool:
    """Whether the rest of the step cannot tell why it should have the second."""
    return all(x <= y for x, y in zip(_figures(a), _figures(b), strict=True)) and set(
        a.shared
    ) <= set(b.shared)
