"""The numbers of a figure: memory over a step by what it holds, exact, by replay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph, Storage
from graph_capture.costs.library_workspace import STORAGE_NAME
from solvers.replay import Replay, replay
from solvers.schedule import Schedule
from solvers.uniform import turning_point

MODEL = "parameters, buffers"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"
INOUT = "inputs, outputs"
SAVED = "saved for the backward"
RECOMPUTED = "recomputed"
TEMPORARIES = "temporaries"
WORKSPACE = "kernels' scratch"
RESIDENT = "the caller's own"
GROUPS = (
    MODEL,
    OPTIMIZER,
    GRADIENTS,
    INOUT,
    SAVED,
    RECOMPUTED,
    TEMPORARIES,
    WORKSPACE,
    RESIDENT,
)

_OF_CATEGORY = {
    "parameter": MODEL,
    "buffer": MODEL,
    "optimizer_state": OPTIMIZER,
    "gradient": GRADIENTS,
    "input": INOUT,
    "output": INOUT,
    "resident": RESIDENT,
    "waiting": RESIDENT,
    "bucket": GRADIENTS,
    "gathered": MODEL,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryTimeline:
    """Bytes alive during each run of a schedule, by group.

    Parameters
    ----------
    num_bytes
        A row for each of :data:`GROUPS`, a column for each run. A column's sum is the
        replay's memory of that run.
    edges_us
        When runs begin, and finally when the step ends, by the cost model; one longer
        than the schedule.
    turn
        The run with which the backward pass begins, including recomputations for its
        first operator; the number of runs if there is no backward pass.
    peak_bytes, peak_run
        As in the replay.
    """

    num_bytes: NDArray[np.int64]
    edges_us: NDArray[np.float64]
    turn: int
    peak_bytes: int
    peak_run: int

    @property
    def total_bytes(self) -> NDArray[np.int64]:
        """All groups together, for each run."""
        total: NDArray[np.int64] = self.num_bytes.sum(axis=0)
        return total

    @property
    def step_us(self) -> float:
        """Time of the step."""
        return float(self.edges_us[-1])

    @property
    def turn_us(self) -> float:
        """When the backward pass begins."""
        return float(self.edges_us[self.turn])


def memory_timeline(graph: CostGraph, schedule: Schedule) -> MemoryTimeline:
    """Replay a schedule and return what its memory holds, run by run.

    Memory that the user sees keeps its own group throughout (parameters, gradients of
    parameters, optimizer state, inputs, outputs). Of the rest, a version made before the
    backward pass that outlives its beginning counts as saved, one made by a repeated run
    as recomputed, and any other as temporary. A library's workspace, which exists from
    the first moment on, counts as scratch, as does other such memory without its own
    group.

    Raises
    ------
    InvalidScheduleError
        When the schedule does not compute the step.
    """
    outcome = replay(graph, schedule)
    order = np.array(schedule.order, dtype=np.int64)
    turn = turn_of(graph, schedule)
    num_bytes = np.zeros((len(GROUPS), len(order) + 1), dtype=np.int64)
    for storage in graph.storages:
        if storage.producer is None:
            num_bytes[GROUPS.index(_resident_group(storage)), 0] += storage.size_bytes
    storages, born, last = _versions(outcome)
    groups = _groups(graph, schedule, storages, born, last, turn)
    size = np.array([s.size_bytes for s in graph.storages], dtype=np.int64)[storages]
    np.add.at(num_bytes, (groups, born), size)
    np.subtract.at(num_bytes, (groups, last + 1), size)
    num_bytes = num_bytes.cumsum(axis=1)[:, :-1]
    scratch = np.array([op.workspace_bytes for op in graph.operators], dtype=np.int64)
    num_bytes[GROUPS.index(WORKSPACE)] += scratch[order]
    cost_ns = np.array([op.cost_ns for op in graph.operators], dtype=np.int64)[order]
    return MemoryTimeline(
        num_bytes=num_bytes,
        edges_us=np.concatenate(([0], np.cumsum(cost_ns))) / 1e3,
        turn=turn,
        peak_bytes=outcome.peak_bytes,
        peak_run=outcome.peak_step,
    )


def turn_of(graph: CostGraph, schedule: Schedule) -> int:
    """The run with which the backward pass begins, including recomputations for it."""
    last_forward = turning_point(graph)
    order = schedule.order
    turn = next((i for i, v in enumerate(order) if v >= last_forward), len(order))
    again = repeats(schedule)
    while turn > 0 and turn < len(order) and again[turn - 1]:
        turn -= 1
    return turn


def repeats(schedule: Schedule) -> NDArray[np.bool_]:
    """For each run, whether its operator has run before."""
    order = np.array(schedule.order, dtype=np.int64)
    again = np.ones(len(order), dtype=bool)
    again[np.unique(order, return_index=True)[1]] = False
    return again


def _resident_group(storage: Storage) -> str:
    """The group of memory that exists from the first moment on.

    A library's workspace has the category of buffers, but is not one of the model's.
    """
    if storage.name == STORAGE_NAME:
        return WORKSPACE
    return _OF_CATEGORY.get(storage.category, WORKSPACE)


def _versions(outcome: Replay) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Storage, first and last run of each version."""
    over = {(k, run) for run, k, _ in outcome.in_place}  # the output's from that run on
    live = np.array(
        [(k, born, last - ((k, last) in over)) for k, born, last in outcome.live], dtype=np.int64
    ).reshape(-1, 3)
    return live[:, 0], live[:, 1], live[:, 2]


def _groups(
    graph: CostGraph,
    schedule: Schedule,
    storages: NDArray[np.int64],
    born: NDArray[np.int64],
    last: NDArray[np.int64],
    turn: int,
) -> NDArray[np.int64]:
    """Index into :data:`GROUPS` of each version."""
    unsaid = -1
    own = np.array(
        [
            GROUPS.index(_OF_CATEGORY[s.category]) if s.category in _OF_CATEGORY else unsaid
            for s in graph.storages
        ],
        dtype=np.int64,
    )[storages]
    again = repeats(schedule)[born]
    saved = (born < turn) & (last >= turn)
    rest = np.select(
        [again, saved],
        [GROUPS.index(RECOMPUTED), GROUPS.index(SAVED)],
        GROUPS.index(TEMPORARIES),
    )
    return np.where(own == unsaid, rest, own)
