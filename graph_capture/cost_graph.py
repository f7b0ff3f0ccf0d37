"""The cost graph: what a training step computes, in order, and what that costs.

A :class:`CostGraph` is pure data and knows nothing of torch. It is all that solvers
see. It can be stored as JSON, and a plain DAG, such as an instance of another paper,
can be written in the same terms.

Vocabulary
----------
operator
    One call that allocates memory or has an effect. Views and tuple getters are not
    operators: they are folded into the storages that they look at.
storage
    One block of memory. It has one producer, or none when it is *resident*
    (parameters, inputs, optimizer state), and as many aliases as the graph has
    views of it.
base order
    ``operators[0], operators[1], …``: the order of the unplanned step. Every
    operator runs at least once, and may run again later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import cached_property
from typing import Any, Literal, get_args

import networkx as nx

from .json_text import read_json

Phase = Literal["forward", "loss", "backward", "optimizer"]
Category = Literal[
    "parameter",
    "buffer",
    "gradient",
    "optimizer_state",
    "input",
    "output",
    "activation",
    "temporary",
    "resident",
    "waiting",
    "bucket",
    "gathered",
]

GRAPH_FORMAT = 1

MAX_TOTAL = 2**62
"""Bytes of all storages, and nanoseconds of all operators: solvers add up in 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """One block of memory.

    Parameters
    ----------
    name
        Name of the tensor that owns the block, unique in the graph.
    size_bytes
        Bytes that the allocator hands out for it.
    producer
        Index of the operator that allocates it; ``None`` when it is resident
        from the first moment of the step to the last.
    category
        What it counts as in the breakdown of a peak.
    kept
        Whether its first version stays alive to the end of the step (gradients, and
        outputs that the training loop holds).
    """

    name: str
    size_bytes: int
    producer: int | None
    category: Category = "activation"
    kept: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One call of the step.

    Parameters
    ----------
    name
        Unique in the graph.
    target
        What is called, e.g. ``"aten.mm.default"``.
    inputs, outputs
        Indices of the storages that it reads and that it allocates.
    cost_ns
        Time of one run, in nanoseconds (or in an instance's own unit), without the
        copies that ``rewrites`` may need.
    workspace_bytes
        Scratch memory that it holds only while it runs.
    phase
        Part of the step in which it first runs.
    pinned
        Why it must run exactly once; ``None`` when it may run again.
    ordered
        Whether its first run must keep its place among the other ordered
        operators (random draws, effects).
    module_path, source
        Where in the user's model it comes from.
    rewrites
        ``(input, output, nanoseconds)``: it writes the output over the input, as eager
        does. If the input's value is read again after a run, that run writes to a copy
        instead, which takes that long and another block.
    """

    name: str
    target: str = ""
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    cost_ns: int = 0
    workspace_bytes: int = 0
    phase: Phase = "forward"
    pinned: str | None = None
    ordered: bool = False
    module_path: str = ""
    source: str = ""
    rewrites: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class CostGraph:
    """Operators in base order and the storages between them.

    Raises
    ------
    ValueError
        When an index is out of range, an operator reads a storage before it is
        produced, producer and outputs disagree, or a figure is negative.
    """

    operators: tuple[Operator, ...]
    storages: tuple[Storage, ...]

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def num_operators(self) -> int:
        return len(self.operators)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes of the storages that live during the whole step."""
        return sum(s.size_bytes for s in self.storages if s.producer is None)

    @cached_property
    def base_cost_ns(self) -> int:
        """Time of the step that recomputes nothing."""
        return sum(op.cost_ns for op in self.operators)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each storage, the operators that read it, in base order."""
        readers: list[list[int]] = [[] for _ in self.storages]
        for v, op in enumerate(self.operators):
            for k in op.inputs:
                readers[k].append(v)
        return tuple(tuple(r) for r in readers)

    def working_set_bytes(self, v: int) -> int:
        """The least bytes that operator ``v`` alone needs, beside the resident ones."""
        op = self.operators[v]
        touched = {k for k in (*op.inputs, *op.outputs) if self.storages[k].producer is not None}
        over_bytes = sum(self.storages[old].size_bytes for old, _, _ in op.rewrites)
        return sum(self.storages[k].size_bytes for k in touched) + op.workspace_bytes - over_bytes

    def to_networkx(self) -> nx.DiGraph:
        """A ``DiGraph`` of operators; an edge carries the storages that flow along it."""
        g = nx.DiGraph()
        for v, op in enumerate(self.operators):
            g.add_node(v, **asdict(op))
        for k, storage in enumerate(self.storages):
            if storage.producer is None:
                continue
            for v in self.consumers[k]:
                if v == storage.producer:
                    continue
                if not g.has_edge(storage.producer, v):
                    g.add_edge(storage.producer, v, storages=[], size_bytes=0)
                edge = g.edges[storage.producer, v]
                edge["storages"].append(k)
                edge["size_bytes"] += storage.size_bytes
        return g

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {
            "format": GRAPH_FORMAT,
            "operators": [_record_of(op) for op in self.operators],
            "storages": list(map(_plain, self.storages)),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostGraph:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        ValueError
            When ``data`` is not such a graph; names the place.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"not a cost graph but a {type(data).__name__}")
        if data.get("format") != GRAPH_FORMAT:
            raise ValueError(
                f"cost graph of format {data.get('format')!r:.100}; this version reads "
                f"{GRAPH_FORMAT}"
            )
        operators = tuple(_operator(*item) for item in _records(data, "operators"))
        storages = tuple(_storage(*item) for item in _records(data, "storages"))
        return cls(operators, storages)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> CostGraph:
        """The inverse of :meth:`to_json`.

        Raises
        ------
        ValueError
            When ``text`` is not such a graph; names the place.
        """
        return cls.from_dict(read_json(text))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what is computed: targets, wiring and sizes, but not costs.

        Resident storages that nobody reads are left out: what a module happens to
        keep from an earlier step does not make it another step.
        """
        part = [
            k for k, s in enumerate(self.storages) if s.producer is not None or self.consumers[k]
        ]
        at = {k: i for i, k in enumerate(part)}
        shape: list[list[tuple[Any, ...]]] = [
            [
                (
                    op.target,
                    [at[k] for k in op.inputs],
                    [at[k] for k in op.outputs],
                    op.phase,
                    op.pinned,
                )
                for op in self.operators
            ],
            [
                (s.size_bytes, s.producer, s.category, s.kept)
                for s in map(self.storages.__getitem__, at)
            ],
        ]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:32]


def _plain(record: Operator | Storage) -> dict[str, Any]:
    """Its fields, as ``asdict`` returns them; they are numbers, strings and tuples of numbers."""
    return {name: getattr(record, name) for name in type(record).__slots__}


def _record_of(op: Operator) -> dict[str, Any]:
    """An operator as plain data; ``rewrites``, which are rare, only if there are any."""
    record = _plain(op)
    if not op.rewrites:
        del record["rewrites"]
    return record


def _records(data: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects in a list, each with its place."""
    records = data.get(key)
    if not isinstance(records, (list, tuple)):
        raise ValueError(f"not a cost graph: {key!r} must be a list, got {records!r:.100}")
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(
                f"not a cost graph: at {key}[{i}]: must be an object, got {record!r:.100}"
            )
    return [(f"{key}[{i}]", record) for i, record in enumerate(records)]


def _operator(place: str, record: Mapping[str, Any]) -> Operator:
    _check_fields(place, record, Operator, _OPERATOR_FIELDS)
    fields = dict(record)
    for key in ("inputs", "outputs"):
        if key in fields:
            fields[key] = tuple(fields[key])
    if "rewrites" in fields:
        fields["rewrites"] = tuple(map(tuple, fields["rewrites"]))
    return Operator(**fields)


def _storage(place: str, record: Mapping[str, Any]) -> Storage:
    _check_fields(place, record, Storage, _STORAGE_FIELDS)
    return Storage(**record)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_indices(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_count, value))


def _is_rewrites(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_indices(x) and len(x) == 3 for x in value)


_OPERATOR_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a text"),
    "target": (_is_text, "a text"),
    "inputs": (_is_indices, "a list of indices"),
    "outputs": (_is_indices, "a list of indices"),
    "cost_ns": (_is_count, "a whole number from 0 on"),
    "workspace_bytes": (_is_count, "a whole number from 0 on"),
    "phase": (lambda value: value in get_args(Phase), f"one of {get_args(Phase)}"),
    "pinned": (lambda value: value is None or _is_text(value), "a text or null"),
    "ordered": (lambda value: isinstance(value, bool), "true or false"),
    "module_path": (_is_text, "a text"),
    "source": (_is_text, "a text"),
    "rewrites": (_is_rewrites, "a list of (input, output, nanoseconds)"),
}
_STORAGE_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a text"),
    "size_bytes": (_is_count, "a whole number from 0 on"),
    "producer": (lambda value: value is None or _is_count(value), "an index or null"),
    "category": (lambda value: value in get_args(Category), f"one of {get_args(Category)}"),
    "kept": (lambda value: isinstance(value, bool), "true or false"),
}


def _check_fields(
    place: str,
    record: Mapping[str, Any],
    kind: type,
    fields: Mapping[str, tuple[Callable[[Any], bool], str]],
) -> None:
    for key, value in record.items():
        if key not in fields:
            raise ValueError(f"not a cost graph: at {place}: there is no {key!r:.100} in it")
        fits, wanted = fields[key]
        if not fits(value):
            raise ValueError(
                f"not a cost graph: at {place}.{key}: must be {wanted}, got {value!r:.100}"
            )
    for field in dataclass_fields(kind):
        if field.default is MISSING and field.name not in record:
            raise ValueError(f"not a cost graph: at {place}: {field.name!r} is missing")


def _validate(graph: CostGraph) -> None:
    num_storages = len(graph.storages)
    produced = {k for k, s in enumerate(graph.storages) if s.producer is None}
    for k, storage in enumerate(graph.storages):
        if storage.size_bytes < 0:
            raise ValueError(f"storage {storage.name!r} has {storage.size_bytes} bytes")
        if storage.producer is not None and not 0 <= storage.producer < len(graph.operators):
            raise ValueError(f"storage {storage.name!r} names no operator: {storage.producer}")
        if storage.producer is not None and k not in graph.operators[storage.producer].outputs:
            raise ValueError(f"storage {storage.name!r} is not an output of its producer")
    for v, op in enumerate(graph.operators):
        if op.cost_ns < 0 or op.workspace_bytes < 0:
            raise ValueError(f"operator {op.name!r} has a negative cost or workspace")
        for k in (*op.inputs, *op.outputs):
            if not 0 <= k < num_storages:
                raise ValueError(f"operator {op.name!r} names no storage: {k}")
        for k in op.inputs:
            if k not in produced:
                raise ValueError(
                    f"operator {op.name!r} reads {graph.storages[k].name!r} before it is produced"
                )
        for k in op.outputs:
            if graph.storages[k].producer != v:
                raise ValueError(f"storage {graph.storages[k].name!r} has two producers")
        _validate_rewrites(graph, op)
        produced.update(op.outputs)
    total_bytes = sum(s.size_bytes for s in graph.storages)
    total_bytes += max((op.workspace_bytes for op in graph.operators), default=0)
    total_ns = sum(op.cost_ns + sum(ns for _, _, ns in op.rewrites) for op in graph.operators)
    for total, unit in ((total_bytes, "bytes"), (total_ns, "ns")):
        if total > MAX_TOTAL:
            raise ValueError(
                f"all sizes or times together are more than {MAX_TOTAL} {unit}, with which solvers "
                "cannot reckon: are they in the right units?"
            )


def _validate_rewrites(graph: CostGraph, op: Operator) -> None:
    for old, new, copy_ns in op.rewrites:
        if old not in op.inputs or new not in op.outputs:
            raise ValueError(f"operator {op.name!r} writes over what it does not read or allocate")
        before, after = graph.storages[old], graph.storages[new]
        own = before.producer is not None and not before.kept
        if not own or before.size_bytes != after.size_bytes or copy_ns < 0:
            raise ValueError(f"operator {op.name!r} cannot write {after.name!r} to {before.name!r}")
    for place in (0, 1):
        if len({rewrite[place] for rewrite in op.rewrites}) < len(op.rewrites):
            raise ValueError(f"operator {op.name!r} writes over one storage twice")
