"""The menu of a block: what it can save, and what that costs in time and memory.

An option is a schedule of the block's small graph (see ``chains/blocks.py``). Its part
before the middle is the forward part, that after the middle the backward part with the
recomputations inside the block; what the second reads of the first is saved. The menu
of Zhao et al., *Rockmate: an Efficient, Fast, Automatic and Generic Tool for
Re-materialization in PyTorch* (ICML 2023), Section 3.2, solves an integer program for
the fastest option within each of several limits on the saved bytes and on the backward
part's peak. Here annealing finds them: a block has some dozens of operators.

Guarantee: figures come from a replay, and options that are no better than another in
any figure are left out. Nothing guarantees that the best are found.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import GraphArrays
from ..fast_replay import fast_replay
from ..local_search import NOTHING, Walk
from ..retention_plan import (
    Gaps,
    RetentionPlan,
    find_gaps,
    keep_all_plan,
    schedule_from_plan,
)
from .blocks import Block, needed_runs, sweep_peak

SAVED_LEVELS = (0.0, 0.05, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
PEAK_LEVELS = (0.0, 0.4, 0.15)
PEAK_LEVELS_UNSAVED = (0.35, 0.0, 0.1, 0.2, 0.5, 0.7)
"""Shares of what a menu's options span, for the limits of the searches."""
MOVES_PER_GAP = 80
MOST_MOVES = 10_000


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a block; operators are those of the small graph.

    Parameters
    ----------
    first
        The forward part when it runs first: everything.
    again
        The forward part when it is run again: what the next block's boundary
        and the saved storages need.
    inner
        The same for the saved storages alone.
    back
        The backward part.
    saved_bytes
        What stays for the backward part; with the block's own boundary where
        that is read again.
    forward_peak_bytes, inner_peak_bytes, back_peak_bytes
        Within the parts, the block's own boundary included.
    """

    first: tuple[int, ...]
    again: tuple[int, ...]
    inner: tuple[int, ...]
    back: tuple[int, ...]
    saved_bytes: int
    forward_peak_bytes: int
    inner_peak_bytes: int
    back_peak_bytes: int
    first_ns: int
    again_ns: int
    inner_ns: int
    back_ns: int

    def figures(self) -> tuple[int, ...]:
        """The figures by which options are compared; less is better."""
        return (
            self.saved_bytes,
            self.forward_peak_bytes,
            self.inner_peak_bytes,
            self.back_peak_bytes,
            self.first_ns + self.back_ns,
            self.again_ns + self.back_ns,
            self.inner_ns + self.back_ns,
        )


def block_menu(
    block: Block, *, deadline_s: float, seed: int = 0, stop: threading.Event | None = None
) -> tuple[Option, ...]:
    """Return the options of ``block`` that no other option beats in every figure.

    Parameters
    ----------
    deadline_s
        On the monotonic clock; after it, only what needs no search is returned.
    stop
        The same, when another thread sets it.
    """
    g = block.arrays
    gaps = find_gaps(g)
    found: list[tuple[Option, RetentionPlan]] = []
    for plan in _simple_plans(block, gaps):
        _add(found, block, gaps, plan)
    every = max(found, key=lambda item: item[0].saved_bytes)[0]
    least = min(found, key=lambda item: item[0].saved_bytes)[0]
    lowest_peak = int(_own_needs(g)[block.middle + 1 :].max(initial=0))
    highest_peak = max(every.back_peak_bytes, least.back_peak_bytes)
    if every.saved_bytes == least.saved_bytes and lowest_peak >= highest_peak:
        return _best([option for option, _ in found])
    search = _Search(block, gaps, found, seed, stop)

    def run_all(levels: Sequence[tuple[float, float]], until_s: float) -> None:
        span_bytes = every.saved_bytes - least.saved_bytes
        for n, (saved, peak) in enumerate(levels):
            now_s = time.monotonic()
            search.run(
                least.saved_bytes + int(saved * span_bytes),
                lowest_peak + int(peak * (highest_peak - lowest_peak)),
                now_s + (until_s - now_s) / (len(levels) - n),
            )

    begin_s = time.monotonic()
    run_all([(saved, 1.0) for saved in SAVED_LEVELS], begin_s + 0.5 * (deadline_s - begin_s))
    run_all([(0.0, p) for p in PEAK_LEVELS_UNSAVED], begin_s + 0.7 * (deadline_s - begin_s))
    lowest_peak = min(option.back_peak_bytes for option, _ in found)
    run_all([(saved, p) for p in PEAK_LEVELS for saved in SAVED_LEVELS], deadline_s)
    return _best([option for option, _ in found])


def everything(block: Block) -> Option:
    """Return the option that saves all that the backward part reads and recomputes nothing."""
    gaps = find_gaps(block.arrays)
    option = option_of(block, gaps, keep_all_plan(gaps))
    assert option is not None  # nothing is recomputed, so no limit on repetitions applies
    return option


def _simple_plans(block: Block, gaps: Gaps) -> list[RetentionPlan]:
    """Save everything; save nothing, with recomputed storages retained or made anew each time."""
    middle = block.middle
    crosses = (gaps.begin < middle) & (gaps.end > middle) & (gaps.fixed == 0)
    plans = [keep_all_plan(gaps)]
    for retained in (True, False):
        plan = keep_all_plan(gaps)
        plan.until[crosses] = gaps.begin[crosses]
        if retained:
            plan.since[crosses] = middle + 1
        plans.append(plan)
    return plans


class _Search:
    """Anneal options within given limits, each from the best start known so far."""

    def __init__(
        self,
        block: Block,
        gaps: Gaps,
        found: list[tuple[Option, RetentionPlan]],
        seed: int,
        stop: threading.Event | None,
    ) -> None:
        self.block, self.gaps, self.found = block, gaps, found
        self.seed, self.stop = seed, stop
        self.least_ns = int(block.arrays.cost.sum())
        self.tried: set[tuple[int, int]] = set()

    def run(self, saved_bytes: int, peak_bytes: int, deadline_s: float) -> None:
        """Look for the fastest option within both limits, unless the time is up.

        The limits become one budget for the annealer: workspace of the middle
        stands for all that may not be saved, the filler for all that the
        backward part may not use.
        """
        if time.monotonic() >= deadline_s or (self.stop is not None and self.stop.is_set()):
            return
        if (saved_bytes, peak_bytes) in self.tried:
            return
        self.tried.add((saved_bytes, peak_bytes))
        nearest, start = min(self.found, key=lambda item: _excess(item[0], saved_bytes, peak_bytes))
        if _excess(nearest, saved_bytes, peak_bytes) == (0, self.least_ns):
            return  # within the limits, and nothing recomputed
        g, middle = self.block.arrays, self.block.middle
        handed_in_bytes = int(g.size[g.outputs(middle)].sum())
        passed_bytes = int(g.size[list(self.block.passed_on)].sum())
        inside_bytes = saved_bytes + passed_bytes + handed_in_bytes
        budget_bytes = max(int(g.size.sum() + g.workspace.max()), inside_bytes + peak_bytes)
        size, workspace = g.size.copy(), g.workspace.copy()
        size[self.block.filler] = budget_bytes - peak_bytes
        workspace[middle] = max(0, peak_bytes - inside_bytes)
        limited = g._replace(size=size, workspace=workspace)
        seed = self.seed + 31 * len(self.tried)
        walk = Walk(limited, self.gaps, budget_bytes, start, seed)
        walk.run(min(MOST_MOVES, MOVES_PER_GAP * self.gaps.num), deadline_s, stop=self.stop)
        if walk.best_cost != NOTHING:
            plan = RetentionPlan(walk.best_until, walk.best_since)
            _add(self.found, self.block, self.gaps, plan)


def _excess(option: Option, saved_bytes: int, peak_bytes: int) -> tuple[int, int]:
    """How far ``option`` is beyond the limits, then its time."""
    over = max(0, option.saved_bytes - saved_bytes) + max(0, option.back_peak_bytes - peak_bytes)
    return over, option.first_ns + option.back_ns


def _add(
    found: list[tuple[Option, RetentionPlan]], block: Block, gaps: Gaps, plan: RetentionPlan
) -> None:
    option = option_of(block, gaps, plan)
    if option is not None:
        found.append((option, plan.copy()))


def option_of(block: Block, gaps: Gaps, plan: RetentionPlan) -> Option | None:
    """The option that is ``plan``; ``None`` when it recomputes far too often."""
    g, middle = block.arrays, block.middle
    schedule = schedule_from_plan(g, gaps, plan)
    if schedule is None:
        return None
    order = schedule.order
    at = order.index(middle)
    first, back = order[1:at], order[at + 1 :]  # the owner's run belongs to no block
    memory = fast_replay(g, np.array(order, dtype=np.int64)).memory_bytes
    boundary = [int(k) for k in g.outputs(0)]
    made = {int(k) for k in g.outputs(middle)}
    saved: set[int] = set()
    for v in back:
        saved.update(int(k) for k in g.inputs(v) if k not in made and not g.kept[k])
        made.update(int(k) for k in g.outputs(v))
    crossing = saved.union(block.passed_on)
    again = needed_runs(g, first, crossing)
    inner = needed_runs(g, first, saved)
    return Option(
        first=first,
        again=again,
        inner=inner,
        back=back,
        saved_bytes=int(g.size[list(saved)].sum()),
        forward_peak_bytes=int(memory[:at].max(initial=0)),
        inner_peak_bytes=sweep_peak(g, g.size, inner, saved.union(boundary), boundary),
        back_peak_bytes=int(memory[at + 1 :].max(initial=0)),
        first_ns=_cost(g, first),
        again_ns=_cost(g, again),
        inner_ns=_cost(g, inner),
        back_ns=_cost(g, back),
    )


def _cost(g: GraphArrays, runs: tuple[int, ...]) -> int:
    return int(g.cost[list(runs)].sum()) if runs else 0


def _own_needs(g: GraphArrays) -> np.ndarray:
    """Bytes of each operator's inputs, outputs and workspace."""
    need = g.workspace.copy()
    for v in range(g.num_operators):
        need[v] += g.size[g.inputs(v)].sum() + g.size[g.outputs(v)].sum()
    return need


def _best(options: list[Option]) -> tuple[Option, ...]:
    """Drop options that another one equals or beats in every figure."""
    kept: list[Option] = []
    for option in sorted(options, key=Option.figures):
        figures = option.figures()
        if not any(
            all(a <= b for a, b in zip(other.figures(), figures, strict=True)) for other in kept
        ):
            kept.append(option)
    return tuple(kept)
