"""What is in memory at the peak, why, and what it would take to make it again.

A storage at the peak could be absent only by being made again for its next use. What
that costs is asked of the schedule as it is: everything that is in memory just before
that use, or stays all step long, is there to be read; what is missing is made in turn.
So the figure is the time for this storage alone, and it does not ask for memory. If what
is missing comes from an operator that must run exactly once (the state of a generator, a
choice), it would have to be kept instead; it is named, with its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from graph_capture.cost_graph import CostGraph
from graph_capture.costs.library_workspace import STORAGE_NAME
from solvers.schedule import Schedule

from ..plan_record import LIBRARY_WORKSPACE, PlanRecord


class Why(StrEnum):
    """Why a storage is in memory at the peak."""

    RESIDENT = "resident"  # all step long: parameters, inputs, optimizer state
    IN_USE = "in_use"  # the operator at the peak reads it or makes it
    HELD = "held"  # to the end of the step: gradients, outputs in the user's hands
    ONLY_ONCE = "only_once"  # what makes it must run exactly once
    MADE_AGAIN = "made_again"  # recomputed already, for a use that is still to come
    SAVED = "saved"  # it could be made again; to keep it is what the plan decided


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """A storage that another could be made from, if it were kept.

    Parameters
    ----------
    made_by, call, module_path
        The operator that makes it, what that calls, and where in the model.
    size_bytes
        Its size.
    pinned
        Why that operator must run exactly once.
    """

    made_by: str
    call: str
    module_path: str
    size_bytes: int
    pinned: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A storage in memory at the peak.

    Parameters
    ----------
    storage
        Its name in the graph.
    category
        As in :class:`planner.PeakMemory`.
    size_bytes
        Its size.
    why
        Why it is there.
    made_by, call, module_path, source
        The operator that makes it, what that calls, and where in the model; ``""`` for
        what is resident.
    last_used_by, last_used_phase, last_used_module
        The operator that reads it last, the part of the step that this belongs to, and
        where in the model it is; ``""`` where nothing reads it after the peak.
    freed_us
        When it is freed, in microseconds from the beginning of the step.
    recompute_us
        Time to make it again for its next use after the peak, from what is in memory
        then and ``also_needed``; ``None`` where it is not read after the peak, or cannot
        be made again.
    pinned
        Why it cannot, for :attr:`Why.ONLY_ONCE`; else ``""``.
    also_needed
        What would have to be kept for that, because it can be made only once and is not
        in memory at that use.
    """

    storage: str
    category: str
    size_bytes: int
    why: Why
    made_by: str = ""
    call: str = ""
    module_path: str = ""
    source: str = ""
    last_used_by: str = ""
    last_used_phase: str = ""
    last_used_module: str = ""
    freed_us: float
    recompute_us: float | None = None
    pinned: str = ""
    also_needed: tuple[Needed, ...] = ()


def holders_at_peak(plan: PlanRecord) -> tuple[Holder, ...]:
    """Return everything in memory at the plan's predicted peak, the largest first."""
    found = [*_resident(plan), *_Peak(plan).holders()]
    return tuple(sorted(found, key=lambda holder: -holder.size_bytes))


def _resident(plan: PlanRecord) -> Iterator[Holder]:
    for storage in plan.graph.storages:
        if storage.producer is None and storage.size_bytes:
            library = storage.name == STORAGE_NAME
            yield Holder(
                storage=storage.name,
                category=LIBRARY_WORKSPACE if library else storage.category,
                size_bytes=storage.size_bytes,
                why=Why.RESIDENT,
                freed_us=plan.predicted_step_us,
            )


class _Peak:
    """The moment of the peak, and the uses that come after it."""

    def __init__(self, plan: PlanRecord) -> None:
        self.graph, self.order = plan.graph, plan.schedule.order
        self.outcome = plan.replay
        self.at = self.outcome.peak_step
        self.ends_us = _ends_us(plan.graph, plan.schedule)
        self.born_first = _first_births(plan.schedule, plan.graph)
        self.reads: dict[int, list[int]] = {}  # by storage, the runs after the peak
        for i in range(self.at + 1, len(self.order)):
            for k in self.graph.operators[self.order[i]].inputs:
                self.reads.setdefault(k, []).append(i)

    def holders(self) -> Iterator[Holder]:
        over = {k for run, k, _ in self.outcome.in_place if run == self.at}
        for k, born, last in self.outcome.live:
            if born <= self.at <= last and k not in over and self.graph.storages[k].size_bytes:
                yield self._holder(k, born, last)

    def _holder(self, k: int, born: int, last: int) -> Holder:
        storage = self.graph.storages[k]
        assert storage.producer is not None
        maker = self.graph.operators[storage.producer]
        uses = [i for i in self.reads.get(k, ()) if i <= last]  # a later version has the others
        reader = self.graph.operators[self.order[uses[-1]]] if uses else None
        why, again = self._why(k, born, uses)
        return Holder(
            storage=storage.name,
            category=storage.category,
            size_bytes=storage.size_bytes,
            why=why,
            made_by=maker.name,
            call=maker.target,
            module_path=maker.module_path,
            source=maker.source,
            last_used_by="" if reader is None else reader.name,
            last_used_phase="" if reader is None else reader.phase,
            last_used_module="" if reader is None else reader.module_path,
            freed_us=self.ends_us[last],
            recompute_us=None if again is None else again[0] / 1e3,
            pinned=maker.pinned or "" if why is Why.ONLY_ONCE else "",
            also_needed=() if again is None else again[1],
        )

    def _why(
        self, k: int, born: int, uses: list[int]
    ) -> tuple[Why, tuple[int, tuple[Needed, ...]] | None]:
        """Return the reason, and what it takes to make the storage again where that is one."""
        storage = self.graph.storages[k]
        peak = self.graph.operators[self.order[self.at]]
        if k in (*peak.inputs, *peak.outputs):
            return Why.IN_USE, None
        if storage.kept:
            return Why.HELD, None
        assert storage.producer is not None
        if not uses or self.graph.operators[storage.producer].pinned is not None:
            return Why.ONLY_ONCE, None
        why = Why.SAVED if born == self.born_first[k] else Why.MADE_AGAIN
        return why, self._again(k, uses[0])

    def _again(self, k: int, run: int) -> tuple[int, tuple[Needed, ...]]:
        """Return the time in ns to make a storage just before a run, and what would be kept."""
        there = {j for j, born, last in self.outcome.live if born < run <= last} - {k}
        needed: set[int] = set()
        kept: set[int] = set()
        missing = [k]
        while missing:
            storage = missing.pop()
            producer = self.graph.storages[storage].producer
            if producer is None or producer in needed:
                continue
            operator = self.graph.operators[producer]
            if operator.pinned is not None:
                kept.add(storage)
                continue
            needed.add(producer)
            missing += [j for j in operator.inputs if j not in there]
        cost_ns = sum(self.graph.operators[v].cost_ns for v in needed)
        return cost_ns, tuple(self._needed(j) for j in sorted(kept))

    def _needed(self, k: int) -> Needed:
        storage = self.graph.storages[k]
        assert storage.producer is not None
        maker = self.graph.operators[storage.producer]
        return Needed(
            made_by=maker.name,
            call=maker.target,
            module_path=maker.module_path,
            size_bytes=storage.size_bytes,
            pinned=maker.pinned or "",
        )


def _ends_us(graph: CostGraph, schedule: Schedule) -> list[float]:
    """Return when each run ends."""
    ends, now_ns = [], 0
    for v in schedule.order:
        now_ns += graph.operators[v].cost_ns
        ends.append(now_ns / 1e3)
    return ends


def _first_births(schedule: Schedule, graph: CostGraph) -> dict[int, int]:
    """Return the run that first makes each storage."""
    born: dict[int, int] = {}
    for i, v in enumerate(schedule.order):
        for k in graph.operators[v].outputs:
            born.setdefault(k, i)
    return born
