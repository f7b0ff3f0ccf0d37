"""The user's rules for recomputation: what to recompute never, and what always.

A pattern names operators by the path of their module (``"encoder.layer.0"`` includes
everything below it), by a glob over the path (``"*.attention"``), or by what they
call (``"aten.gelu"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from .captured_step import CapturedStep
from .cost_graph import CostGraph, Operator, Storage
from .errors import CaptureError
from .folding.blocks import OperatorCode


def apply_policies(
    captured: CapturedStep, never: Sequence[str] = (), always: Sequence[str] = ()
) -> CapturedStep:
    """Pin the operators that ``never`` names; repeat in backward those that ``always`` names.

    Raises
    ------
    CaptureError
        When a pattern names no operator, or ``always`` one that cannot be repeated.
    """
    if never:
        captured = _pin(captured, never)
    if always:
        captured = _Repeater(captured, always).result()
    return captured


def matches(operator: Operator, pattern: str) -> bool:
    """Whether ``pattern`` names ``operator``."""
    path = operator.module_path
    if path and (path == pattern or path.startswith(f"{pattern}.") or fnmatchcase(path, pattern)):
        return True
    return any(
        target == pattern or target.rpartition(".")[0] == pattern
        for target in operator.target.split("+")
    )


def _named(captured: CapturedStep, patterns: Sequence[str], option: str) -> set[int]:
    named: set[int] = set()
    for pattern in patterns:
        found = {
            v
            for v, op in enumerate(captured.graph.operators)
            if op.phase == "forward"
            and any(  # an operator may join calls of several modules
                matches(replace(op, module_path=call.meta["module_path"]), pattern)
                for call in captured.code[v].calls
            )
        }
        if not found:
            raise CaptureError(
                f"{option} names {pattern!r}, which is not a module path or call of this model's "
                "forward; see the module_path and target of "
                "graph_capture.capture(model, sample_input).operators"
            )
        named |= found
    return named


def _pin(captured: CapturedStep, patterns: Sequence[str]) -> CapturedStep:
    named = _named(captured, patterns, "never_recompute")
    operators = tuple(
        replace(op, pinned="never_recompute") if v in named and op.pinned is None else op
        for v, op in enumerate(captured.graph.operators)
    )
    return replace(captured, graph=CostGraph(operators, captured.graph.storages))


class _Repeater:
    """Adds a repetition before the first backward use of what the named operators produce."""

    def __init__(self, captured: CapturedStep, patterns: Sequence[str]) -> None:
        self._captured = captured
        self._graph = captured.graph
        self._named = _named(captured, patterns, "always_recompute")
        for v in self._named:
            op = self._graph.operators[v]
            if op.pinned is not None:
                raise CaptureError(
                    f"always_recompute names {op.name!r}, which is pinned: {op.pinned}"
                )
        self._storages: list[Storage] = list(self._graph.storages)
        self._carriers = list(captured.carriers)
        self._operators: list[Operator] = []
        self._code: list[OperatorCode] = []
        self._state_of: dict[int, int] = {}
        self._index: dict[int, int] = {}  # old operator -> new
        self._repeated: dict[int, int] = {}  # storage -> storage of the repetition

    def result(self) -> CapturedStep:
        for v, op in enumerate(self._graph.operators):
            if op.phase == "backward":
                for k in op.inputs:
                    self._repeat(k)
            self._append(v, self._repeated if op.phase == "backward" else {})
        producer = {k: v for v, op in enumerate(self._operators) for k in op.outputs}
        storages = tuple(replace(s, producer=producer.get(k)) for k, s in enumerate(self._storages))
        return replace(
            self._captured,
            graph=CostGraph(tuple(self._operators), storages),
            code=tuple(self._code),
            carriers=tuple(self._carriers),
            state_of=self._state_of,
            loss=self._index[self._captured.loss],
        )

    def _repeat(self, k: int) -> None:
        v = self._graph.storages[k].producer
        if v not in self._named or k in self._repeated or self._is_handed_out(k):
            return
        assert v is not None
        op = self._graph.operators[v]
        for read in op.inputs:
            self._repeat(read)
        for out in op.outputs:
            if not self._is_handed_out(out):
                self._repeated[out] = len(self._storages)
                self._storages.append(
                    replace(self._storages[out], name=f"{self._storages[out].name}_repeated")
                )
                self._carriers.append(self._carriers[out])
        self._append(v, self._repeated, repeats=True)

    def _is_handed_out(self, k: int) -> bool:
        """Whether the loop has this storage, if only until it lets go of it."""
        storage = self._graph.storages[k]
        return storage.kept or storage.category == "output"

    def _append(self, v: int, at: dict[int, int], *, repeats: bool = False) -> None:
        op, code = self._graph.operators[v], self._captured.code[v]
        own = set(op.outputs) if not repeats else set()
        # A repetition makes its own copy of what is already kept, and drops it at once.
        copies_bytes = sum(
            self._graph.storages[k].size_bytes
            for k in op.outputs
            if repeats and self._is_handed_out(k)
        )
        moved = {k: new for k, new in at.items() if k not in own}
        copied = [r for r in op.rewrites if repeats and self._is_handed_out(r[1])]
        new = len(self._operators)
        if v in self._captured.state_of:
            self._state_of[new] = self._index[self._captured.state_of[v]]
        self._code.append(
            replace(
                code,
                reads={node: moved.get(k, k) for node, k in code.reads.items()},
                outputs=[moved.get(k, k) for k in code.outputs],
                clones=[(moved.get(a, a), moved.get(b, b)) for a, b in code.clones],
                blanks=[moved.get(k, k) for k in code.blanks],
                repeats=repeats,
            )
        )
        self._operators.append(
            replace(
                op,
                name=f"{op.name}_repeated" if repeats else op.name,
                inputs=tuple(sorted({moved.get(k, k) for k in op.inputs})),
                outputs=tuple(
                    moved.get(k, k) for k in op.outputs if not (repeats and k not in moved)
                ),
                cost_ns=op.cost_ns + sum(ns for _, _, ns in copied),
                workspace_bytes=op.workspace_bytes + copies_bytes,
                phase="backward" if repeats else op.phase,
                ordered=op.ordered and not repeats,
                rewrites=tuple(
                    (moved.get(old, old), moved.get(new, new), ns)
                    for old, new, ns in op.rewrites
                    if (old, new, ns) not in copied
                ),
            )
        )
        if not repeats:
            self._index[v] = new
