"""The least memory of a step in blocks, and the points of blocks that low budgets need."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter

from ..replay import replay
from ..schedule import Schedule
from .points import BlockPoints, Point
from .program import Choice, Program, schedules_of
from .stepping import BlockedStep

LEAN_SAVED = (0.0, 0.0625, 0.125, 0.25, 0.4)
LEAN_PEAKS = (0.05, 0.15, 0.3, 0.6, 0.8)
"""The same for low budgets: parts of what it can save, and of what lies between the peak of
the least memory and that of the schedule that repeats everything."""


def least_memory_of_blocks(
    step: BlockedStep, points: Sequence[BlockPoints], *, time_limit_s: float = 20.0, seed: int = 0
) -> tuple[dict[str, Schedule], int]:
    """Return the choice with the lowest peak that is found, and this peak in bytes."""
    end_s = time.monotonic() + time_limit_s
    low = _outside_blocks(step)
    alike = map(attrgetter, ("repeat_all", "keep_all"))
    best = min((_same_pick(step, points, pick) for pick in alike), key=itemgetter(1))
    if best[1] <= low:
        return best  # the optimizer, say, needs most
    add_lean_points(points, time_limit_s)
    program = Program(step)
    choices = [[Choice.of(p) for p in ps.points] for ps in points]
    picks = (_least_saved, _least_needed)
    best = min(best, *(_same_pick(step, points, pick) for pick in picks), key=itemgetter(1))
    high = best[1]
    while high - low > max(1, best[1] // 5_000) and time.monotonic() < end_s:
        middle = (low + high) // 2
        found = program.solve(choices, middle, time_limit_s=2.0, seed=seed, gap=1.0)
        if found.chosen is None:
            low = middle
            continue
        chosen = schedules_of(step, points, found.chosen)
        peak_bytes = replay(step.whole, step.schedule(chosen)).peak_bytes
        if peak_bytes < best[1]:
            best = chosen, peak_bytes
        high = min(middle, peak_bytes)
    return best


def _outside_blocks(step: BlockedStep) -> int:
    """The most at a moment outside of blocks, whatever they save: no choice has less."""
    inside = {v for call in step.calls for v in (call.forward, call.backward)}
    memory = replay(step.rest, Schedule.keep_all(step.rest)).memory_bytes
    return max((num for v, num in enumerate(memory) if v not in inside), default=0)


def _same_pick(
    step: BlockedStep, points: Sequence[BlockPoints], pick: Callable[[BlockPoints], Point]
) -> tuple[dict[str, Schedule], int]:
    """Choose alike for all blocks; return the peak as well."""
    chosen = {c.path: pick(points[c.block]).schedule for c in step.calls}
    return chosen, replay(step.whole, step.schedule(chosen)).peak_bytes


def _least_saved(ps: BlockPoints) -> Point:
    return min(ps.points, key=lambda p: (p.saved_bytes, p.backward_bytes))


def _least_needed(ps: BlockPoints) -> Point:
    return min(ps.points, key=lambda p: (p.peak_bytes, p.saved_bytes))


def add_lean_points(points: Sequence[BlockPoints], time_limit_s: float) -> None:
    """Solve points for low budgets: that save little, and need little while they run."""
    end_s = time.monotonic() + time_limit_s
    share_s = time_limit_s / ((len(LEAN_PEAKS) * len(LEAN_SAVED) + 1) * max(1, len(points)))
    for ps in points:
        saves = ps.repeat_all
        needs = ps.least_peak(time_limit_s=share_s)
        for saved_share in LEAN_SAVED:
            saved = saves.saved_bytes + int(saved_share * ps.keep_all.saved_bytes)
            for share in LEAN_PEAKS:
                peak = needs.peak_bytes + int(share * (saves.peak_bytes - needs.peak_bytes))
                if time.monotonic() < end_s:
                    ps.solve(saved, peak, time_limit_s=share_s, gap=1e-2)
