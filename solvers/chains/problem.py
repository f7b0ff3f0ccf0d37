"""Assemble the chain's dynamic program: figures of blocks and menus in, a schedule out.

The table's memory is rounded to slots and a little pessimistic where a storage
dies within a block, so decisions are read for somewhat more memory than the
budget, too. They are written down as operators and replayed; the fastest
schedule that fits is taken.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays, IntArray
from ..fast_replay import fast_replay
from ..schedule import Schedule
from .blocks import Held, cut_out, needed_runs, sweep_peak
from .chain import Chain
from .menu import Option, block_menu, everything
from .table import NEVER, ChainFigures, ChainTable, fill_table, row

MOST_SLOTS = 1500
MOST_ENTRIES = 10_000_000
"""Entries of the table, 10 bytes each."""
STEPS_PER_S = 3e8
"""Measured on one core of a server: entries that the table's loops visit in a second."""
SLACK = 1.08
"""How far beyond the budget the table is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainOutcome:
    """The best schedule within the budget, and what was found on the way.

    Parameters
    ----------
    schedule, cost_ns, peak_bytes
        ``None`` when nothing fits or the graph is no chain.
    num_blocks
        Of the chain that the schedule comes from (or of the finest one); 0 when
        the graph is no chain.
    num_options
        In all menus together.
    num_slots
        Number of slots the budget was divided into.
    reason
        Why there is no schedule; empty when there is one.
    """

    schedule: Schedule | None
    cost_ns: int | None
    peak_bytes: int | None
    num_blocks: int
    num_options: int
    num_slots: int
    reason: str


def no_schedule(num_blocks: int, reason: str) -> ChainOutcome:
    return ChainOutcome(
        schedule=None,
        cost_ns=None,
        peak_bytes=None,
        num_blocks=num_blocks,
        num_options=0,
        num_slots=0,
        reason=reason,
    )


class ChainProblem:
    """A chain with its blocks and menus, ready for the table."""

    def __init__(self, graph: CostGraph, g: GraphArrays, chain: Chain) -> None:
        self.g, self.chain, self.held = g, chain, Held(g, chain)
        self.blocks = [cut_out(graph, g, chain, self.held, i) for i in range(chain.num_blocks)]
        self.menus: list[tuple[Option, ...]] = []
        self.advance: list[tuple[int, ...]] = []
        for block in self.blocks:
            needed = needed_runs(block.arrays, range(block.middle), block.passed_on)
            self.advance.append(tuple(block.operators[v] for v in needed))

    def add_menus(
        self,
        menus: dict[Hashable, tuple[Option, ...]],
        deadline_s: float,
        seed: int,
        stop: threading.Event | None = None,
    ) -> None:
        """Look up the blocks' menus, and search those that are not known yet."""
        keys = [block.key() for block in self.blocks]
        weight: dict[Hashable, int] = {}  # time goes where the bytes are
        for key, block in zip(keys, self.blocks, strict=True):
            weight[key] = weight.get(key, 0) + int(block.arrays.size.sum()) + 1
        new = {key: block for key, block in zip(keys, self.blocks, strict=True) if key not in menus}
        left = sum(weight[key] for key in new)
        for key, block in sorted(new.items(), key=lambda item: weight[item[0]]):
            now_s = time.monotonic()
            until_s = now_s + max(0.0, deadline_s - now_s) * weight[key] / left
            menus[key] = block_menu(block, deadline_s=until_s, seed=seed, stop=stop)
            left -= weight[key]
        self.menus = [menus[key] for key in keys]

    def add_everything(self) -> None:
        """Give each block one option, to save everything; saving its boundary alone is the table's
        split.

        These are the two choices that a stage has in rotor.
        """
        menus: dict[Hashable, tuple[Option, ...]] = {}
        for block in self.blocks:
            key = block.key()
            if key not in menus:
                menus[key] = (everything(block),)
            self.menus.append(menus[key])

    def figures(self) -> ChainFigures:
        """The figures that the table needs."""
        g, chain = self.g, self.chain
        size = np.where(self.held.last >= 0, 0, g.size)
        num = chain.num_blocks
        options = [option for menu in self.menus for option in menu]
        outside = [b.outside_bytes for b, menu in zip(self.blocks, self.menus) for _ in menu]
        holding, dropping, first = [], [], []
        for i in range(num):
            runs = range(chain.cuts[i], chain.cuts[i + 1])
            wanted = chain.boundaries[i + 1] if i + 1 < num else ()
            own = chain.boundaries[i]
            holding.append(sweep_peak(g, size, runs, (*wanted, *own), own))
            dropping.append(sweep_peak(g, size, runs, wanted, own))
            first.append(int(self.held.bytes_at[list(runs)].max(initial=0)))
        return ChainFigures(
            boundary_bytes=_ints(g.size[list(ks)].sum() if ks else 0 for ks in chain.boundaries),
            advance_first_ns=_ints(
                g.cost[chain.cuts[i] : chain.cuts[i + 1]].sum() for i in range(num)
            ),
            advance_again_ns=_ints(
                g.cost[list(runs)].sum() if runs else 0 for runs in self.advance
            ),
            advance_bytes=_ints(holding),
            advance_free_bytes=_ints(dropping),
            held_first_bytes=_ints(first),
            held_again_bytes=_ints(
                self.held.entering(chain.ends[i + 1], chain.ends[i + 1]) for i in range(num)
            ),
            ptr=_ints(np.cumsum([0, *(len(menu) for menu in self.menus)])),
            saved_bytes=_ints(o.saved_bytes for o in options),
            forward_bytes=_ints(o.forward_peak_bytes for o in options),
            inner_bytes=_ints(o.inner_peak_bytes for o in options),
            back_bytes=_ints(o.back_peak_bytes + b for o, b in zip(options, outside)),
            first_ns=_ints(o.first_ns for o in options),
            again_ns=_ints(o.again_ns for o in options),
            inner_ns=_ints(o.inner_ns for o in options),
            back_ns=_ints(o.back_ns for o in options),
        )

    def solve(self, budget_bytes: int, time_limit_s: float) -> ChainOutcome:
        """Fill the table and read off the fastest schedule that fits."""
        free_bytes = budget_bytes - self.g.resident_bytes
        num_options = sum(len(menu) for menu in self.menus)
        if free_bytes <= 0:
            return no_schedule(self.chain.num_blocks, "the budget is below what is resident")
        figures = self.figures()
        num_slots, slot_bytes = choose_slots(figures, free_bytes, time_limit_s)
        table = fill_table(figures, num_slots, slot_bytes)
        schedule, cost_ns, peak_bytes = self._read(table, budget_bytes)
        return ChainOutcome(
            schedule=schedule,
            cost_ns=cost_ns,
            peak_bytes=peak_bytes,
            num_blocks=self.chain.num_blocks,
            num_options=num_options,
            num_slots=num_slots,
            reason="" if schedule is not None else "no schedule of the chain fits",
        )

    def _read(
        self, table: ChainTable, budget_bytes: int
    ) -> tuple[Schedule | None, int | None, int | None]:
        """Fastest first, by bisection and then one by one: the first that fits."""
        last = self.chain.num_blocks - 1
        costs = table.cost[row(0, last, self.chain.num_blocks)]
        steps = np.flatnonzero(np.diff(costs, prepend=NEVER))
        memories = [int(m) for m in steps if costs[m] < NEVER]
        best: tuple[Schedule | None, int | None, int | None] = (None, None, None)

        def fits(m: int) -> bool:
            nonlocal best
            order = self._order(table, m)
            outcome = fast_replay(self.g, np.array(order, dtype=np.int64))
            if not outcome.valid or outcome.peak_bytes > budget_bytes:
                return False
            if best[1] is None or outcome.cost_ns < best[1]:
                best = Schedule(tuple(order)), outcome.cost_ns, outcome.peak_bytes
            return True

        low, high = 0, len(memories)  # all below low seem to fit; none from high on
        while low < high:
            middle = (low + high) // 2
            if fits(memories[middle]):
                low = middle + 1
            else:
                high = middle
        for m in memories[low + 1 : low + 7]:
            fits(m)
        if best[0] is None:
            for m in memories[:6]:
                fits(m)
        return best

    def _order(self, table: ChainTable, num_slots: int) -> list[int]:
        """The operators of the decisions for all blocks and ``num_slots`` slots."""
        num, chain = self.chain.num_blocks, self.chain
        order: list[int] = []
        stack: list[tuple[str, int, int, int]] = [("solve", 0, num - 1, num_slots)]
        while stack:
            what, i, j, m = stack.pop()
            if what == "back":
                order += self._runs(i, self.menus[i][j].back)
                continue
            decision = int(table.decision[row(i, j, num), m])
            is_first = j == num - 1
            if decision < 0:
                s = -decision
                for b in range(i, s):
                    order += (
                        range(chain.cuts[b], chain.cuts[b + 1]) if is_first else self.advance[b]
                    )
                kept = _slots(self._boundary_bytes(i), table.slot_bytes)
                stack.append(("solve", i, s - 1, m))
                stack.append(("solve", s, j, m - kept))
                continue
            option = self.menus[i][decision]
            stack.append(("back", i, decision, 0))
            if is_first:
                order += self._runs(i, option.first)
            else:
                order += self._runs(i, option.again if i < j else option.inner)
            if i < j:
                stack.append(("solve", i + 1, j, m - _slots(option.saved_bytes, table.slot_bytes)))
        return order

    def _boundary_bytes(self, i: int) -> int:
        ks = self.chain.boundaries[i]
        return int(self.g.size[list(ks)].sum()) if ks else 0

    def _runs(self, i: int, runs: Sequence[int]) -> list[int]:
        return [self.blocks[i].operators[v] for v in runs]


def choose_slots(figures: ChainFigures, free_bytes: int, time_limit_s: float) -> tuple[int, int]:
    """``(number of slots, bytes of a slot)`` that the time allows; exact where it can be."""
    num = figures.num_blocks
    pairs = num * (num + 1) // 2
    per_slot = pairs * (num / 3 + len(figures.saved_bytes) / num)
    most = min(MOST_SLOTS, MOST_ENTRIES // pairs, int(time_limit_s * STEPS_PER_S / per_slot))
    most = max(most, 50)
    sizes = (figures.boundary_bytes, figures.saved_bytes, figures.advance_bytes)
    peaks = (figures.advance_free_bytes, figures.forward_bytes, figures.back_bytes)
    held = (figures.held_first_bytes, figures.held_again_bytes, figures.inner_bytes)
    unit = math.gcd(*(int(x) for array in (*sizes, *peaks, *held) for x in array))
    readable = int(SLACK * free_bytes)
    if unit and readable // unit <= most:
        return readable // unit, unit
    return most, max(1, -(-readable // most))


def _slots(size_bytes: int, slot_bytes: int) -> int:
    return (size_bytes + slot_bytes // 2) // slot_bytes


def _ints(values: Iterable[int]) -> IntArray:
    return np.array([int(x) for x in values], dtype=np.int64)
