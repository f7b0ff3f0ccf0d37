"""The only judge of a schedule: is it valid, how high is its peak, how long does it take.

:func:`replay` walks a schedule run by run. It is written to be read; the
compiled twin that search uses lives in ``fast_replay.py`` and is tested
against this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from graph_capture.cost_graph import CostGraph
from graph_capture.units import format_bytes, format_us

from .schedule import Schedule


class InvalidScheduleError(ValueError):
    """The schedule does not compute the step."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a schedule does, by moment.

    Parameters
    ----------
    peak_bytes
        Highest memory of all moments, resident storages included.
    peak_step
        Index into ``Schedule.order`` of the first moment with that memory.
    cost_ns
        Sum of the costs of all runs.
    memory_bytes
        Memory while each run is in progress: everything alive before it that
        is used by it or later, what it allocates, and its workspace.
    live
        For each version of a storage ``(storage, born, last)``: the runs
        between which it is alive, both included.
    in_place
        ``(run, input, output)``: which runs write an output over what they read last, whose
        memory is the output's during the run.
    """

    peak_bytes: int
    peak_step: int
    cost_ns: int
    memory_bytes: tuple[int, ...]
    live: tuple[tuple[int, int, int], ...]
    in_place: frozenset[tuple[int, int, int]] = frozenset()

    def live_at(self, step: int) -> tuple[int, ...]:
        """Storages with a version alive during run ``step``; doubled versions appear twice."""
        over = {k for run, k, _ in self.in_place if run == step}
        return tuple(k for k, born, last in self.live if born <= step <= last and k not in over)

    def __repr__(self) -> str:
        return (
            f"<Replay of {len(self.memory_bytes)} runs: peak {format_bytes(self.peak_bytes)} at "
            f"run {self.peak_step}, {format_us(self.cost_ns / 1e3)}>"
        )


def replay(graph: CostGraph, schedule: Schedule) -> Replay:
    """Walk ``schedule`` over ``graph``.

    Raises
    ------
    InvalidScheduleError
        When an operator is missing, a pinned one runs twice, an input was
        never computed, or ordered operators change places.
    """
    order = schedule.order
    for i, v in enumerate(order):
        if type(v) is not int and (isinstance(v, bool) or not isinstance(v, Integral)):
            raise InvalidScheduleError(f"run {i} is no index of an operator: {v!r:.100}")
    num_steps = len(order)
    version: dict[int, int] = {}  # storage -> index into births
    births: list[tuple[int, int]] = []  # (storage, step)
    last_use: list[int] = []
    runs = [0] * graph.num_operators
    last_ordered = -1
    turn = num_steps  # the run of the loss: what is saved before it may be read twice after it
    rewrites: list[tuple[int, int, int, int]] = []  # (step, version of the input, output, ns)

    for i, v in enumerate(order):
        if not 0 <= v < graph.num_operators:
            raise InvalidScheduleError(f"run {i} names no operator: {v}")
        op = graph.operators[v]
        if runs[v] and op.pinned is not None:
            raise InvalidScheduleError(f"{op.name!r} runs again but is pinned: {op.pinned}")
        if op.ordered and not runs[v]:
            if v < last_ordered:
                raise InvalidScheduleError(
                    f"{op.name!r} first runs after {graph.operators[last_ordered].name!r}, "
                    "which must come after it"
                )
            last_ordered = v
        runs[v] += 1
        if op.phase == "loss":
            turn = min(turn, i)
        for k in op.inputs:
            if graph.storages[k].producer is None:
                continue
            if k not in version:
                raise InvalidScheduleError(
                    f"run {i}, {op.name!r}, reads {graph.storages[k].name!r} before it is computed"
                )
            last_use[version[k]] = max(last_use[version[k]], i)
        rewrites += [(i, version[old], new, ns) for old, new, ns in op.rewrites]
        for k in op.outputs:
            births.append((k, i))
            if graph.storages[k].kept and k in version:
                last_use.append(i)  # a duplicate: every use reads the first version
            else:
                last_use.append(num_steps - 1 if graph.storages[k].kept else i)
                version[k] = len(births) - 1

    missing = [graph.operators[v].name for v, count in enumerate(runs) if not count]
    if missing:
        raise InvalidScheduleError(f"{len(missing)} operators never run, {missing[0]!r} first")

    copies_ns = 0
    in_place: set[tuple[int, int, int]] = set()
    delta = [0] * (num_steps + 1)
    for i, old, new, copy_ns in rewrites:
        k, born = births[old]
        if last_use[old] == i and not born < turn <= i:
            in_place.add((i, k, new))
            delta[i] -= graph.storages[k].size_bytes
            delta[i + 1] += graph.storages[k].size_bytes
        else:
            copies_ns += copy_ns

    for (k, born), last in zip(births, last_use, strict=True):
        delta[born] += graph.storages[k].size_bytes
        delta[last + 1] -= graph.storages[k].size_bytes
    memory = []
    level = graph.resident_bytes
    for i, v in enumerate(order):
        level += delta[i]
        memory.append(level + graph.operators[v].workspace_bytes)
    peak = max(memory, default=graph.resident_bytes)
    return Replay(
        peak_bytes=peak,
        peak_step=memory.index(peak) if memory else 0,
        cost_ns=sum(graph.operators[v].cost_ns for v in order) + copies_ns,
        memory_bytes=tuple(memory),
        live=tuple((k, born, last) for (k, born), last in zip(births, last_use, strict=True)),
        in_place=frozenset(in_place),
    )
