"""A step whose blocks are written down apart, and the whole that they make together.

The *rest* is the step with two operators for each call of a block: one stands for the
block's forward, one for its backward. Both are replaced by the block's own operators, whose
inputs, outputs, tangents and gradients are storages of the rest. What a block saves from
its forward to its backward is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graph_capture.cost_graph import CostGraph, Operator, Storage

from ..schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block's own step: its forward, its turn, its backward.

    Parameters
    ----------
    graph
        Its operators and storages.
    turn
        The operator that stands for everything between its forward and its backward.
    """

    graph: CostGraph
    turn: int

    def split(self, schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the runs before the turn and those after it."""
        at = schedule.order.index(self.turn)
        return schedule.order[:at], schedule.order[at + 1 :]


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """One call of a block in a step.

    Parameters
    ----------
    path
        The module that is called.
    block
        Index of its :class:`Block`.
    forward, backward
        Operators of the rest that stand for the two.
    outside
        The rest's storage for each storage of the block that is not its own.
    held_bytes
        Bytes that autograd holds beside it while it runs.
    arguments
        Storages of the rest that are its arguments; they are held until its backward begins.
    """

    path: str
    block: int
    forward: int
    backward: int
    outside: Mapping[int, int]
    held_bytes: int = 0
    arguments: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockedStep:
    """A step, and the blocks in it.

    Parameters
    ----------
    rest
        The step with two operators for each call of a block.
    blocks
        The distinct blocks.
    calls
        The calls, in the order of the forward pass.

    Raises
    ------
    ValueError
        When they do not fit each other.
    """

    rest: CostGraph
    blocks: tuple[Block, ...]
    calls: tuple[BlockCall, ...]

    def __post_init__(self) -> None:
        for call in self.calls:
            _check_call(self.rest, self.blocks[call.block], call)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The modules that are called, each once."""
        return tuple(dict.fromkeys(call.path for call in self.calls))

    @cached_property
    def whole(self) -> CostGraph:
        """The step with the blocks' own operators in their places, in base order."""
        return _Joined(self).graph()

    @cached_property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """For each call, where each operator of its block is in :attr:`whole`; -1 for its turn."""
        return tuple(map(tuple, _Joined(self).places))

    def leaving(self, b: int) -> frozenset[int]:
        """Inputs of a block that nobody reads after its backward, in one of its calls at least."""
        calls = (call for call in self.calls if call.block == b)
        return frozenset().union(*map(self.leaving_with, calls))

    def leaving_with(self, call: BlockCall) -> frozenset[int]:
        """Inputs of a call that nobody reads after its backward."""
        rest, storages = self.rest, self.blocks[call.block].graph.storages
        return frozenset(
            k
            for k, outer in call.outside.items()
            if storages[k].producer is None
            and rest.storages[outer].producer is not None
            and not rest.storages[outer].kept
            and rest.storages[outer].size_bytes == storages[k].size_bytes
            and max(rest.consumers[outer], default=-1) == call.backward
        )

    def schedule(self, chosen: Mapping[str, Schedule]) -> Schedule:
        """Return the schedule of :attr:`whole` in which each block runs by its own.

        Parameters
        ----------
        chosen
            A schedule of each module's block.
        """
        order: list[int] = []
        at = 0
        for _, role in self._roles():
            if role is None:
                order.append(at)
                at += 1
                continue
            c, is_forward = role
            call = self.calls[c]
            block = self.blocks[call.block]
            before, after = block.split(chosen[call.path])
            order.extend(self.places[c][u] for u in (before if is_forward else after))
            at += block.turn if is_forward else block.graph.num_operators - block.turn - 1
        return Schedule(tuple(order))

    def _roles(self) -> Iterator[tuple[int, tuple[int, bool] | None]]:
        """Operators of the rest, and for which call each stands."""
        stands: dict[int, tuple[int, bool]] = {}
        for c, call in enumerate(self.calls):
            stands[call.forward] = (c, True)
            stands[call.backward] = (c, False)
        for v in range(self.rest.num_operators):
            yield v, stands.get(v)


def _check_call(rest: CostGraph, block: Block, call: BlockCall) -> None:
    graph = block.graph
    made = set(rest.operators[call.forward].outputs) | set(rest.operators[call.backward].outputs)
    missing = made - set(call.outside.values())
    if missing:
        name = rest.storages[min(missing)].name
        raise ValueError(f"{call.path!r} makes {name!r}, which its block does not")
    for k, outer in call.outside.items():
        ours, theirs = graph.storages[k], rest.storages[outer]
        if outer in made and ours.size_bytes != theirs.size_bytes:
            raise ValueError(
                f"{ours.name!r} of {call.path!r} has {ours.size_bytes} bytes in its block and "
                f"{theirs.size_bytes} in the step"
            )


class _Joined:
    """Puts the blocks' operators into the places that stand for them."""

    def __init__(self, step: BlockedStep) -> None:
        self._step = step
        self._storages: list[Storage] = list(step.rest.storages)
        self._operators: list[Operator] = []
        self._own: list[dict[int, int]] = [dict(call.outside) for call in step.calls]
        self._shared: dict[tuple[int, int], int] = {}  # what lies beside a block all the time
        self.places: list[list[int]] = [
            [-1] * step.blocks[call.block].graph.num_operators for call in step.calls
        ]
        for v, role in step._roles():
            if role is None:
                self._add_own(step.rest.operators[v])
            else:
                self._add_block(*role)

    def graph(self) -> CostGraph:
        """Return the whole step."""
        return CostGraph(tuple(self._operators), tuple(self._storages))

    def _add_own(self, op: Operator) -> None:
        for k in op.outputs:
            self._storages[k] = replace(self._storages[k], producer=len(self._operators))
        self._operators.append(op)

    def _add_block(self, c: int, is_forward: bool) -> None:
        call = self._step.calls[c]
        block = self._step.blocks[call.block]
        num = block.graph.num_operators
        for u in range(block.turn) if is_forward else range(block.turn + 1, num):
            self._add_operator(c, u, call.held_bytes)

    def _add_operator(self, c: int, u: int, held_bytes: int) -> None:
        call = self._step.calls[c]
        op = self._step.blocks[call.block].graph.operators[u]
        v = self.places[c][u] = len(self._operators)
        for k in op.outputs:
            own = self._storage(c, k)
            self._storages[own] = replace(self._storages[own], producer=v)
        inner = f".{op.module_path}" if op.module_path else ""
        block = self._step.blocks[call.block]
        held = call.arguments if u == block.turn + 1 else ()
        self._operators.append(
            replace(
                op,
                name=f"{call.path}/{op.name}",
                inputs=tuple(sorted({*held, *(self._storage(c, k) for k in op.inputs)})),
                outputs=tuple(self._storage(c, k) for k in op.outputs),
                workspace_bytes=op.workspace_bytes + held_bytes,
                module_path=f"{call.path}{inner}",
                rewrites=tuple(
                    (self._storage(c, old), self._storage(c, new), ns)
                    for old, new, ns in op.rewrites
                ),
            )
        )

    def _storage(self, c: int, k: int) -> int:
        """The storage of the whole step that a block's storage is in one of its calls."""
        own = self._own[c]
        if k in own:
            return own[k]
        call = self._step.calls[c]
        storage = self._step.blocks[call.block].graph.storages[k]
        known = self._shared.get((call.block, k)) if storage.producer is None else None
        if known is None:
            known = len(self._storages)
            self._storages.append(replace(storage, name=f"{call.path}/{storage.name}"))
            if storage.producer is None:
                self._shared[call.block, k] = known
        own[k] = known
        return known


def chosen_for(step: BlockedStep, schedules: Sequence[Schedule]) -> dict[str, Schedule]:
    """Return one schedule for each module, by its block."""
    return {call.path: schedules[call.block] for call in step.calls}
