"""The numbers of a figure: which operators are saved and which recomputed, by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import StrategyError
from solvers.strategies.blocks import module_blocks
from solvers.uniform import turning_point

from .memory_timeline import turn_of

BEFORE, AFTER = "before", "after"
WHOLE = "forward"


class Fate(IntEnum):
    """What becomes of an operator's outputs after the forward pass."""

    ABSENT = -1
    """The layer has no such operator."""
    NOT_NEEDED = 0
    """Runs once, and none of its outputs outlives the forward pass."""
    SAVED = 1
    """Runs once, and an output is still in memory when the backward pass begins."""
    RECOMPUTED = 2
    """Runs a second time."""
    REPEATED = 3
    """Runs three times or more."""
    BOTH = 4
    """An output is still in memory when the backward pass begins, and it runs again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A row: one call of a layer.

    Parameters
    ----------
    module
        Path within the layer; the whole path for operators in no layer.
    call
        Short name of the call.
    number
        Its number among equal calls, from 1 on.
    """

    module: str
    call: str
    number: int = 1

    def __str__(self) -> str:
        number = f" ({self.number})" if self.number > 1 else ""
        return f"{self.module}: {self.call}{number}" if self.module else f"{self.call}{number}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTable:
    """The forward operators of a step, kinds by layers.

    Parameters
    ----------
    columns
        Layers in forward order. Operators before the first and after the last layer have
        their own columns; those between two layers belong to the earlier one.
    rows
        Kinds of operators in forward order.
    fates
        A :class:`Fate` for each row and column.
    saved_bytes
        Bytes of its outputs in memory when the backward pass begins, including outputs
        that the user holds.
    recomputed_bytes
        Bytes that its repeated runs make, each output counted once.
    """

    columns: tuple[str, ...]
    rows: tuple[Kind, ...]
    fates: NDArray[np.int64]
    saved_bytes: NDArray[np.int64]
    recomputed_bytes: NDArray[np.int64]

    def without(self, drop: NDArray[np.bool_]) -> LayerTable:
        """Return the table without some of its rows."""
        keep = np.flatnonzero(~drop)
        return LayerTable(
            columns=self.columns,
            rows=tuple(self.rows[r] for r in keep),
            fates=self.fates[keep],
            saved_bytes=self.saved_bytes[keep],
            recomputed_bytes=self.recomputed_bytes[keep],
        )


def layer_table(graph: CostGraph, schedule: Schedule) -> LayerTable:
    """Sort a graph's forward operators by layer and kind, with the fate of each.

    Layers are the repeated blocks of the model
    (:func:`solvers.strategies.blocks.module_blocks`) or, if there are none, the modules
    of the model.

    Raises
    ------
    InvalidScheduleError
        When the schedule does not compute the step.
    """
    columns = _columns(graph)
    keyed = {name: _kinds(graph, name, members) for name, members in columns.items()}
    rows: list[Kind] = []
    for kinds in keyed.values():
        _merge(rows, list(kinds))
    row_of = {kind: r for r, kind in enumerate(rows)}
    fate, saved, again = _fates(graph, schedule)
    shape = (len(rows), len(columns))
    fates = np.full(shape, int(Fate.ABSENT), dtype=np.int64)
    saved_bytes, recomputed_bytes = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for c, kinds in enumerate(keyed.values()):
        for kind, v in kinds.items():
            r = row_of[kind]
            fates[r, c], saved_bytes[r, c], recomputed_bytes[r, c] = fate[v], saved[v], again[v]
    return LayerTable(
        columns=tuple(columns),
        rows=tuple(rows),
        fates=fates,
        saved_bytes=saved_bytes,
        recomputed_bytes=recomputed_bytes,
    )


def short_call(target: str) -> str:
    """Return a target's short name.

    >>> short_call("aten.native_layer_norm.default")
    'layer_norm'
    >>> short_call("aten.empty_like.default+aten.bernoulli_.float")
    'bernoulli'
    >>> short_call("aten.pow.Tensor_Scalar+aten.mul.out+aten.tanh.out")
    'pow … tanh'
    """
    parts = target.split("+")
    names = [p.removeprefix("aten.").split(".")[0].strip("_") or p for p in parts]
    names = [name.removeprefix("native_") for name in names]
    telling = [n for n in names if n not in _SAY_LITTLE] or names
    telling = [name for name, _ in groupby(telling)]
    if len(telling) > 2:
        return f"{telling[0]} … {telling[-1]}"
    return " + ".join(telling)


_SAY_LITTLE = {"empty_like", "new_empty", "empty", "to_copy", "zeros_like", "copy"}


def _columns(graph: CostGraph) -> dict[str, list[int]]:
    """Forward operators by layer, in forward order."""
    forward = range(turning_point(graph))
    try:
        blocks = module_blocks(graph).blocks
    except StrategyError:  # no repeated blocks
        return _modules(graph, forward)
    columns: dict[str, list[int]] = {BEFORE: []}
    times: Counter[str] = Counter()
    at, now = 0, BEFORE
    for v in forward:
        if at < len(blocks) and v >= blocks[at].begin:
            name = blocks[at].name
            times[name] += 1
            now = name if times[name] == 1 else f"{name} ({times[name]})"
            at += 1
        elif at == len(blocks) and v >= blocks[-1].end:
            now = AFTER
        columns.setdefault(now, []).append(v)
    return {name: members for name, members in columns.items() if members}


def _modules(graph: CostGraph, forward: Sequence[int]) -> dict[str, list[int]]:
    """By module path, to the depth at which paths differ; those without one join the previous."""
    parts = {v: graph.operators[v].module_path.split(".") for v in forward}
    named = [p for p in parts.values() if p != [""]]
    depth = 1
    while named and len({tuple(p[:depth]) for p in named}) == 1 and depth < max(map(len, named)):
        depth += 1
    columns: dict[str, list[int]] = {}
    now = BEFORE if named else WHOLE
    for v in forward:
        now = ".".join(parts[v][:depth]) or now
        columns.setdefault(now, []).append(v)
    return columns


def _kinds(graph: CostGraph, column: str, members: Sequence[int]) -> dict[Kind, int]:
    """The operators of a layer by what distinguishes them in it."""
    layer = column.split(" (")[0] + "."
    seen: Counter[tuple[str, str]] = Counter()
    kinds: dict[Kind, int] = {}
    for v in members:
        operator = graph.operators[v]
        path = f"{operator.module_path}."
        module = path.removeprefix(layer).rstrip(".")
        call = short_call(operator.target or operator.name)
        seen[module, call] += 1
        kinds[Kind(module=module, call=call, number=seen[module, call])] = v
    return kinds


def _merge(rows: list[Kind], kinds: Sequence[Kind]) -> None:
    """Put the kinds of one more layer into the rows, new ones before the known one they precede."""
    waiting: list[Kind] = []
    for kind in kinds:
        if kind in rows:
            at = rows.index(kind)
            rows[at:at] = waiting
            waiting = []
        else:
            waiting.append(kind)
    rows += waiting


def _fates(graph: CostGraph, schedule: Schedule) -> tuple[list[Fate], list[int], list[int]]:
    """Fate, bytes saved and bytes made again, of each operator."""
    outcome = replay(graph, schedule)
    turn = turn_of(graph, schedule)
    runs = Counter(schedule.order)
    saved = [0] * graph.num_operators
    outlives = [False] * graph.num_operators
    first = {v: i for i, v in reversed(list(enumerate(schedule.order)))}
    for k, born, last in outcome.live:
        v = graph.storages[k].producer
        if v is not None and born < turn <= last and born == first[v]:
            saved[v] += graph.storages[k].size_bytes
            # What the user holds lives on, whether or not the plan saves it.
            outlives[v] |= not graph.storages[k].kept
    again = [
        sum(graph.storages[k].size_bytes for k in op.outputs) if runs[v] > 1 else 0
        for v, op in enumerate(graph.operators)
    ]
    fates = [_fate(runs[v], saved[v] > 0, outlives[v]) for v in range(graph.num_operators)]
    return fates, saved, again


def _fate(runs: int, saved: bool, outlives: bool) -> Fate:
    if runs == 1:
        return Fate.SAVED if saved else Fate.NOT_NEEDED
    if outlives:
        return Fate.BOTH
    return Fate.RECOMPUTED if runs == 2 else Fate.REPEATED
