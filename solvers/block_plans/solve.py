"""Plans inside blocks: find points of each block where they matter, and choose among them.

A few points of each block come first, spread over what it can save. The program chooses;
its choice is replayed on the whole step, which alone decides whether it fits. The points that
the lower bound asks for come next, see below. Where they leave a gap, points between the chosen
ones and their neighbours are solved, and schedules of the chosen ones' savings that need less
while they run. The program chooses again, until the choice is proven, no point is new, or the
time is over.

The lower bound speaks of all schedules that repeat a block's operators inside this
block's backward (or forward) only. Between two limits on what is saved, no schedule takes less
time than the bound of the looser one, and none saves less than the tighter one: these
corners, offered to the program as if they were points, give a bound for the step. It is as
good as its corners. So for each corner that the relaxed program uses, the block is solved just
below what the corner's schedule saves, which makes the corner that schedule's own figures, until
all corners in use are such. Those are then the points at which the block's time and savings
are best exchanged, and most choices among them are proven at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..replay import replay
from ..schedule import Schedule
from .least import add_lean_points
from .points import UNLIMITED, BlockPoints, Point
from .program import Assignment, Choice, Program, schedules_of
from .stepping import BlockedStep

FIRST_SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
"""Of what a block can save beyond the least, the first points' limits."""

SOLVE_SHARE = 0.1
"""Of the time left, what one block's solve may take at most."""

POINT_SHARE, PROGRAM_SHARE = 0.25, 0.25
"""Of the gap, what a block's own schedules may be away from their bounds, and the choice."""

SMALLEST_STEP = 1 / 512
"""Of what a block can save: nearer limits are not worth a solve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksResult:
    """A schedule of each block, and how good that is.

    Parameters
    ----------
    chosen
        By module; ``None`` where nothing within the budget was found.
    peak_bytes, cost_ns
        Of the whole step, by replay; 0 without a schedule.
    lower_bound_ns
        No choice of schedules inside the blocks takes less time.
    infeasible
        Whether there is provably no such choice.
    num_points
        How many schedules of blocks were compared.
    solve_s
        Seconds.
    log
        What was found, in turn.
    """

    chosen: Mapping[str, Schedule] | None
    peak_bytes: int
    cost_ns: int
    lower_bound_ns: int
    infeasible: bool
    num_points: int
    solve_s: float
    log: tuple[str, ...]


def solve_blocks(
    step: BlockedStep,
    points: Sequence[BlockPoints],
    budget_bytes: int,
    *,
    time_limit_s: float = 60.0,
    gap: float = 1e-3,
    seed: int = 0,
    hint: Mapping[str, Schedule] | None = None,
) -> BlocksResult:
    """Choose a schedule for each block so that the step fits, in the least time.

    Parameters
    ----------
    points
        Of each distinct block; what is solved here is kept in them.
    budget_bytes
        Of the whole step.
    gap
        In parts of the step's time, for the choice and for each block's own schedules.
    hint
        A schedule of each module, to start from.
    """
    return _Search(step, points, budget_bytes, time_limit_s, gap, seed).run(hint)


class _Search:
    """One search; its stages share the points, the incumbent and the clock."""

    def __init__(
        self,
        step: BlockedStep,
        points: Sequence[BlockPoints],
        budget_bytes: int,
        time_limit_s: float,
        gap: float,
        seed: int,
    ) -> None:
        self.step, self.points, self.budget_bytes = step, points, budget_bytes
        self.gap, self.seed = gap, seed
        self.began_s = time.monotonic()
        self.end_s = self.began_s + time_limit_s
        self.program = Program(step)
        self.blocks_ns = sum(step.blocks[call.block].graph.base_cost_ns for call in step.calls)
        self.best: Mapping[str, Schedule] | None = None
        self.best_ns, self.best_peak = 0, 0
        self.bound_ns = step.whole.base_cost_ns
        self.infeasible = False
        self.log: list[str] = []

    def run(self, hint: Mapping[str, Schedule] | None) -> BlocksResult:
        step = self.step
        self._offer({c.path: self.points[c.block].keep_all.schedule for c in step.calls}, "keep")
        if self.best is None:
            if hint is not None:
                self._offer(hint, "hint")
            self._first_points()
            tried_lean = began = False
            while not (began and self._done()):
                began = True
                found = self._choose()
                if found is None and not tried_lean:
                    tried_lean = True
                    add_lean_points(self.points, max(0.5, 0.4 * self._left_s()))
                    continue
                is_tighter = self._tighten_bound()
                if self.infeasible or self._done():
                    break
                if not is_tighter and not self._refine(found):
                    self._raise_bound(relaxed=False)
                    break
        else:
            self.bound_ns = self.best_ns
        return BlocksResult(
            chosen=self.best,
            peak_bytes=self.best_peak,
            cost_ns=self.best_ns,
            lower_bound_ns=self.bound_ns,
            infeasible=self.infeasible and self.best is None,
            num_points=sum(len(ps.points) for ps in self.points),
            solve_s=time.monotonic() - self.began_s,
            log=tuple(self.log),
        )

    def _left_s(self) -> float:
        return self.end_s - time.monotonic()

    def _done(self) -> bool:
        if self._left_s() <= 0:
            return True
        return self.best is not None and self.best_ns <= self.bound_ns * (1 + self.gap)

    def _note(self, text: str) -> None:
        self.log.append(f"{time.monotonic() - self.began_s:7.2f} s  {text}")

    def _first_points(self) -> None:
        for ps in self.points:
            if self._left_s() <= 0:
                return
            least = ps.repeat_all
            span = ps.keep_all.saved_bytes - least.saved_bytes
            for share in FIRST_SHARES:
                self._solve(ps, least.saved_bytes + int(share * span))
            self._note(f"{len(ps.solved)} points of a block of {ps.graph.num_operators} operators")

    def _solve(
        self, ps: BlockPoints, saved_limit: int, peak_limit: int = UNLIMITED
    ) -> Point | None:
        if self._left_s() <= 0:
            return None
        limit_s = max(0.2, SOLVE_SHARE * self._left_s())
        gap = POINT_SHARE * self.gap
        return ps.solve(saved_limit, peak_limit, time_limit_s=limit_s, gap=gap).point

    def _offer(self, chosen: Mapping[str, Schedule], what: str) -> int:
        """Judge a choice on the whole step; return the bytes that it is above the budget."""
        outcome = replay(self.step.whole, self.step.schedule(chosen))
        excess = outcome.peak_bytes - self.budget_bytes
        if excess <= 0 and (self.best is None or outcome.cost_ns < self.best_ns):
            self.best, self.best_ns = chosen, outcome.cost_ns
            self.best_peak = outcome.peak_bytes
            self._note(f"{what}: {outcome.cost_ns} ns at {outcome.peak_bytes} bytes")
        return excess

    def _choose(self) -> tuple[int, ...] | None:
        """Choose among the points; the rows may be wrong by what is shared, so try again."""
        choices = [[Choice.of(p) for p in ps.points] for ps in self.points]
        budget_bytes = self.budget_bytes
        last = None
        for _ in range(4):
            found = self.program.solve(
                choices,
                budget_bytes,
                time_limit_s=max(0.5, 0.3 * self._left_s()),
                seed=self.seed,
                gap=PROGRAM_SHARE * self.gap,
            )
            if found.chosen is None:
                break
            last = found.chosen
            excess = self._offer(schedules_of(self.step, self.points, found.chosen), "program")
            if excess <= 0:
                break
            budget_bytes -= excess
        return last

    def _tighten_bound(self) -> bool:
        """Raise the bound until its corners are points; return whether points are new."""
        found_new = False
        while self._left_s() > 0:
            used = self._raise_bound(relaxed=True)
            if self.infeasible or self._done():
                break
            before = sum(len(ps.solved) for ps in self.points)
            for ps, corners in used:
                for corner in corners:
                    limit = self._limit_below(ps, corner)
                    if limit is not None:
                        self._solve(ps, limit)
            if sum(len(ps.solved) for ps in self.points) == before:
                break
            found_new = True
        return found_new

    def _limit_below(self, ps: BlockPoints, corner: _Corner) -> int | None:
        """The next limit that says more about a corner: just below what is saved there.

        Between its limit and what the schedule saves there is nothing better, so the corner
        comes as near to the schedule as the next limit is below it.
        """
        least_step = max(1, int(SMALLEST_STEP * ps.keep_all.saved_bytes))
        if corner.at_most == UNLIMITED:
            saved = ps.keep_all.saved_bytes
        else:
            point = ps.solved[corner.at_most, UNLIMITED].point
            saved = corner.at_most if point is None else point.saved_bytes
        if saved - corner.choice.saved_bytes < least_step:
            return None
        return saved - least_step

    def _raise_bound(self, *, relaxed: bool) -> list[tuple[BlockPoints, list[_Corner]]]:
        """Solve the program for the corners; return those that it uses."""
        corners = [_corners(ps) for ps in self.points]
        if self._left_s() <= 0:
            return []
        if not all(corners):
            self.infeasible = True
            return []
        found: Assignment = self.program.solve(
            [[corner.choice for corner in cs] for cs in corners],
            self.budget_bytes,
            time_limit_s=max(0.5, 0.2 * self._left_s()),
            seed=self.seed,
            gap=PROGRAM_SHARE * self.gap,
            inputs_may_go=True,
            relaxed=relaxed,
        )
        if found.infeasible:
            self.infeasible = True
            return []
        own_ns = sum(op.cost_ns for op in self.step.rest.operators)
        self.bound_ns = max(self.bound_ns, own_ns + found.bound_ns)
        return [
            (self.points[b], [corners[b][j] for j in sorted(js)]) for b, js in found.used.items()
        ]

    def _refine(self, chosen: tuple[int, ...] | None) -> bool:
        """Solve new points around the chosen ones; return whether there were any."""
        step, before = self.step, sum(len(ps.solved) for ps in self.points)
        used: dict[int, set[int]] = {b: set() for b in range(len(self.points))}
        block_of = {call.path: call.block for call in step.calls}
        for path, i in zip(step.paths, chosen or (), strict=False):
            used[block_of[path]].add(i)
        for b, ps in enumerate(self.points):
            listed = ps.points
            for i in used[b] or {0, len(listed) - 1}:
                if self._left_s() <= 0:
                    break
                self._around(ps, listed[i])
        return sum(len(ps.solved) for ps in self.points) > before

    def _around(self, ps: BlockPoints, point: Point) -> None:
        least_step = max(1, int(SMALLEST_STEP * ps.keep_all.saved_bytes))
        limits = sorted({s.saved_limit for s in ps.solved.values()} | {ps.keep_all.saved_bytes})
        saved = sorted({*limits, *(p.saved_bytes for p in ps.points)})
        below = max((x for x in saved if x < point.saved_bytes), default=None)
        above = min((x for x in saved if x > point.saved_bytes), default=None)
        for other in (below, above):
            if other is not None and abs(other - point.saved_bytes) > least_step:
                self._solve(ps, (point.saved_bytes + other) // 2)
        lowest = min(p.peak_bytes for p in ps.points)
        for share in (1 / 3, 2 / 3):
            limit = lowest + int(share * (point.peak_bytes - lowest))
            if limit < point.peak_bytes - least_step:
                self._solve(ps, point.saved_bytes, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corner:
    """What no schedule that saves at most so much can be better than."""

    choice: Choice
    at_most: int


def _corners(ps: BlockPoints) -> list[_Corner]:
    """What no schedule of a block can be better than, piece by piece of what it saves."""
    limits = sorted({s.saved_limit for s in ps.solved.values() if s.peak_limit >= UNLIMITED})
    corners = []
    above = 0
    for limit in (*limits, UNLIMITED):
        bound_ns = ps.bound_ns(limit)
        if bound_ns is not None:
            choice = Choice(
                cost_ns=bound_ns,
                saved_bytes=above,
                forward_bytes=ps.least_forward_bytes,
                backward_bytes=ps.least_backward_bytes,
                left_bytes=ps.least_backward_bytes,
            )
            corners.append(_Corner(choice=choice, at_most=limit))
        above = limit + 1
    return corners
