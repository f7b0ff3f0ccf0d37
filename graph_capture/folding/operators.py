"""Fold a traced step into operators and storages.

In a transformer's step, two calls in three are views. They cost nothing and hold
nothing, so they belong to the storage that they look at. In-place calls belong to
the operator that allocated what they write to. The remaining calls, which create
memory or have an effect, are the operators that a plan decides on. Each keeps the fx
nodes that it stands for (:class:`OperatorCode`), so that a schedule can be turned
into a graph again.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable

import torch
from torch.fx import Node

from ..calls.collectives import is_collective
from ..calls.draws import draws
from ..calls.storage_id import storage_id
from ..calls.writes import hidden_writes
from ..errors import CaptureError
from .blocks import Block, OperatorCode
from .last_readings import LastReadings
from .purity import repeats_without_writing, why_pinned
from .reuse import ReuseFinder, fills_its_storage

aten = torch.ops.aten


class Folder:
    """Turns the calls of a traced graph into operators, in order.

    Parameters
    ----------
    placeholders
        The step's inputs.
    last
        Knows which parts of a memory are read after a call.
    reuse
        Finds dead arguments to write over; ``None`` for the step as eager runs it,
        in which nothing is repeated and in-place calls stay as they are.
    """

    def __init__(
        self, placeholders: Iterable[Node], last: LastReadings, reuse: ReuseFinder | None = None
    ) -> None:
        self._reuse = reuse
        self._last = last
        self.operators: list[OperatorCode] = []
        self.blocks: list[Block] = []
        self.current: dict[int, int] = {}  # storage id of the fake value -> block
        self.written_resident: dict[int, str] = {}
        self._last_ordered = -1  # place of the last ordered operator
        self._num_placed = 0
        self._arguments: set[int] = set()
        for node in placeholders:
            k = self.resident(node)
            if node.meta["role"] == "input":
                self._arguments.add(k)

    def resident(self, node: Node) -> int:
        """Declare memory that comes from outside."""
        sid = storage_id(node.meta["val"])
        if sid not in self.current:
            self.current[sid] = self._new_block(node)
        elif node not in self.blocks[self.current[sid]].carriers:
            self.blocks[self.current[sid]].carriers.append(node)
        return self.current[sid]

    def produce_outside(self, nodes: Iterable[Node]) -> OperatorCode:
        """Declare memory that is created at this point, but by code outside the graph."""
        code = OperatorCode(calls=[], pinned="it belongs to the training loop", ordered=True)
        self._place_last(code)
        for node in nodes:
            self._produce(code, node)
        return code

    def block_of(self, node: Node) -> int:
        """Return the block that a node's value is a view of."""
        return self.current[storage_id(node.meta["val"])]

    def fold(self, nodes: Iterable[Node]) -> None:
        """Fold calls in graph order."""
        for node in nodes:
            if node.op == "call_function" and node.target is not operator.getitem:
                self._fold_call(node)

    # -- one call ------------------------------------------------------------

    def _fold_call(self, node: Node) -> None:
        results = [node] if isinstance(node.meta["val"], torch.Tensor) else _getitems(node)
        fresh = [r for r in results if storage_id(r.meta["val"]) not in self.current]
        written = self._written_blocks(node)
        if not fresh and not written and results:
            return  # a view, or a call that returns its argument
        code = OperatorCode(calls=[node], draws=draws(node), pinned=why_pinned(node))
        code.reads = {argument: self.block_of(argument) for argument in node.all_input_nodes}
        code.hungriest_bytes = self._moving_bytes(set(code.reads.values()))
        code.ordered = code.draws or is_collective(node.target)
        if not results:
            code.pinned, code.ordered = code.pinned or "it has an effect and no output", True
        self._guard_resident(node, code, written)
        if not written and self._overwrite_argument(node, code):
            return

        inner = [k for k in written if self.blocks[k].producer is not None]
        apart = self._better_in_place(code, inner)
        host = None if apart else self._host(code, inner)
        if host is None:
            self._write(code, inner, apart)
            self._place_last(code)
            host = code
        self._note_reads(host)
        for result in fresh:
            self._produce(host, result)

    def _overwrite_argument(self, node: Node, code: OperatorCode) -> bool:
        """Let the call write over a dead argument, if it can join the argument's producer."""
        if self._reuse is None or code.pinned or code.ordered:
            return False
        for reuse in self._reuse.candidates(node):
            k = self.block_of(reuse.argument)
            host = self.blocks[k].producer
            if (
                host is None
                or host.pinned
                or host.ordered
                or not host.calls
                or host.calls[-1].meta["phase"] != node.meta["phase"]
                or any(r is not host for r in self.blocks[k].readers)
                or not self._exist_before(host, code)
                or self._read_two_versions(host, code)
                or not self._joins_cheaply(host, code, node)
            ):
                continue
            node.target, node.kwargs = reuse.target, reuse.kwargs
            node.meta["writes"] = (reuse.argument,)
            self._join(host, code)
            self._note_reads(host)
            self.blocks[k].overwritten.update(self.blocks[k].carriers)
            self.blocks[k].carriers.append(node)
            self.current[storage_id(node.meta["val"])] = k
            return True
        return False

    def _joins_cheaply(self, host: OperatorCode, code: OperatorCode, node: Node) -> bool:
        """Whether the two together need no more memory than the larger of the two alone.

        A joined operator needs at once everything that both read. This must not make
        a schedule for a small budget impossible.
        """
        own = sum(self.blocks[k].size_bytes for k in host.outputs)
        before = self._moving_bytes(set(host.reads.values())) + own
        read = set(code.reads.values())
        alone = self._moving_bytes(read) + node.meta["val"].untyped_storage().nbytes()
        joined = set(host.reads.values()) | (read - set(host.outputs))
        return self._moving_bytes(joined) + own <= max(before, alone)

    def _moving_bytes(self, blocks: set[int]) -> int:
        """Bytes of the blocks that do not live during the whole step."""
        return sum(self.blocks[k].size_bytes for k in blocks if self.blocks[k].producer is not None)

    def _exist_before(self, host: OperatorCode, code: OperatorCode) -> bool:
        """Whether ``code``'s inputs, beside what ``host`` makes, exist when ``host`` runs."""
        others = {k for k in code.reads.values() if k not in host.outputs}
        return all(
            (producer := self.blocks[k].producer) is None or producer.place < host.place
            for k in others
        ) and not any(k in self.written_resident for k in others)

    def _read_two_versions(self, host: OperatorCode, code: OperatorCode) -> bool:
        """Whether a memory was written to between what ``host`` reads of it and ``code`` does.

        One operator reads one value of a memory: ``y = x.clone(); x.neg_(); y.mul_(x)`` is two.
        """
        held = {storage_id(argument.meta["val"]): k for argument, k in host.reads.items()}
        return any(
            held.get(storage_id(argument.meta["val"]), k) != k
            for argument, k in code.reads.items()
            if k not in host.outputs
        )

    def _written_blocks(self, node: Node) -> list[int]:
        nodes = [*node.meta["writes"], *hidden_writes(node.target, node.args)]
        return list(dict.fromkeys(self.block_of(n) for n in nodes))

    def _guard_resident(self, node: Node, code: OperatorCode, written: list[int]) -> None:
        """Pin and order writes to parameters, buffers or inputs, and reads of what is written."""
        outside = [k for k in written if self.blocks[k].producer is None]
        if outside:
            code.ordered = True
            if not repeats_without_writing(node.target, node.args):
                code.pinned = code.pinned or f"writes to {self.blocks[outside[0]].name}"
            if not self._arguments.isdisjoint(outside):  # tensors of a call may share memory
                outside += sorted(self._arguments)
            for k in outside:
                self.written_resident[k] = node.name

    def _host(self, code: OperatorCode, inner: list[int]) -> OperatorCode | None:
        """The operator that an in-place call can join, or ``None``.

        It can if nobody else has read what it overwrites. It runs where the allocation
        runs if its other arguments exist by then. Otherwise the allocation moves to
        where the call is.
        """
        if len(inner) != 1:
            return None
        host = self.blocks[inner[0]].producer
        assert host is not None
        if not host.calls or any(r is not host for r in self.blocks[inner[0]].readers):
            return None
        if self._read_two_versions(host, code):
            return None
        early = self._exist_before(host, code)
        if early and not (code.ordered and self._last_ordered > host.place):
            self._join(host, code)
            return host
        read_meanwhile = any(r is not host for k in host.outputs for r in self.blocks[k].readers)
        unmovable = host.ordered or any(k in self.written_resident for k in host.reads.values())
        if read_meanwhile or unmovable:
            return None
        self._join(host, code)
        del self.operators[bisect_left(self.operators, host.place, key=_place)]
        self._place_last(host)
        return host

    def _better_in_place(self, code: OperatorCode, inner: list[int]) -> bool:
        """Whether a call that could join an allocation is better kept apart from it.

        A joined operator reads at once what eager reads one by one: all summands of a
        sum over chunks. If the call writes in place instead, its target is made once and
        never again. In the backward pass that is no loss. In forward, one more tensor of
        that size is worth it (``out += residual``).
        """
        if len(inner) != 1:
            return False
        (k,) = inner
        host = self.blocks[k].producer
        assert host is not None
        if self.blocks[k].last_writer is not None:
            return True
        if not host.calls:
            return False
        together = self._moving_bytes(
            {*host.reads.values(), *code.reads.values()} - set(host.outputs)
        )
        alone = self._moving_bytes(set(code.reads.values()) - set(host.outputs))
        excess_bytes = together - max(host.hungriest_bytes, alone)
        least = 0 if self._never_repeated(host) else self.blocks[k].size_bytes
        return excess_bytes > least

    def _never_repeated(self, host: OperatorCode) -> bool:
        """Whether nothing is lost if an operator cannot run again."""
        return self._reuse is None or host.calls[0].meta["phase"] == "backward"

    def _write(self, code: OperatorCode, inner: list[int], apart: bool) -> None:
        """Let a call that joins no other write over dead memory, in place, or to a copy."""
        (node,) = code.calls
        if len(inner) == 1 and self._last.leaves_nothing(node) and self._renew(code, inner[0]):
            return
        hosts = [self.blocks[k].producer for k in inner]
        written_before = any(self.blocks[k].last_writer is not None for k in inner)
        no_loss = bool(hosts) and all(
            host is not None and host.calls and self._never_repeated(host) for host in hosts
        )
        if apart or written_before or no_loss:
            self._write_in_place(code, inner)
        else:
            self._clone_first(code, inner)

    def _write_in_place(self, code: OperatorCode, inner: list[int]) -> None:
        """Write as eager does; the target and its earlier readers then run only once."""
        for k in inner:
            block = self.blocks[k]
            assert block.producer is not None
            block.last_writer = code
            block.producer.pinned = block.producer.pinned or "what it makes is written to later"
            code.ordered = True
            code.pinned = code.pinned or f"writes to {block.name}"
            self.written_resident[k] = code.calls[0].name

    def _renew(self, code: OperatorCode, k: int) -> bool:
        """Let a call that overwrites all of a block write to a new one, if possible."""
        old = self.blocks[k]
        carriers = [c for c in old.carriers if c not in old.overwritten]
        if len(carriers) != 1 or not fills_its_storage(carriers[0].meta["val"]):
            return False
        if old.last_writer is not None:
            return False
        code.blanks.append(self._new_version(code, k, carriers))
        for argument in [a for a, block in code.reads.items() if block == k]:
            del code.reads[argument]
        return True

    def _place_last(self, code: OperatorCode) -> None:
        """Append an operator to the base order."""
        code.place = self._num_placed
        self._num_placed += 1
        self.operators.append(code)
        if code.ordered:
            self._last_ordered = code.place

    def _note_reads(self, host: OperatorCode) -> None:
        for k in set(host.reads.values()):
            self.blocks[k].readers.add(host)

    def _join(self, host: OperatorCode, code: OperatorCode) -> None:
        host.calls.extend(code.calls)
        for argument, k in code.reads.items():
            if k not in host.outputs:
                host.reads[argument] = k
        host.hungriest_bytes = max(host.hungriest_bytes, code.hungriest_bytes)
        host.draws |= code.draws
        host.ordered |= code.ordered
        if host.ordered:
            self._last_ordered = max(self._last_ordered, host.place)
        host.pinned = host.pinned or code.pinned

    def _clone_first(self, code: OperatorCode, inner: list[int]) -> None:
        """Overwrite a copy, so that what others read stays unchanged."""
        for k in inner:
            old = self.blocks[k]
            carriers = [c for c in old.carriers if c not in old.overwritten]
            if len(carriers) != 1:
                raise CaptureError(
                    f"{code.calls[0].target} writes to memory that two outputs of one call share"
                )
            code.clones.append((k, self._new_version(code, k, carriers)))

    def _new_version(self, code: OperatorCode, k: int, carriers: list[Node]) -> int:
        """Start another block for what a memory holds from now on."""
        old, new = self.blocks[k], len(self.blocks)
        self.blocks.append(
            Block(
                name=f"{old.name}_rewritten_{new}",
                size_bytes=old.size_bytes,
                carriers=carriers,
                producer=code,
                device_type=old.device_type,
            )
        )
        code.outputs.append(new)
        for carrier in old.carriers:
            self.current[storage_id(carrier.meta["val"])] = new
        return new

    def _produce(self, code: OperatorCode, result: Node) -> None:
        sid = storage_id(result.meta["val"])
        if sid in self.current:  # a second output on the same memory
            self.blocks[self.current[sid]].carriers.append(result)
            return
        k = self._new_block(result)
        self.blocks[k].producer = code
        self.current[sid] = k
        code.outputs.append(k)

    def _new_block(self, node: Node) -> int:
        value = node.meta["val"]
        self.blocks.append(
            Block(
                name=node.name,
                size_bytes=value.untyped_storage().nbytes(),
                carriers=[node],
                device_type=value.device.type,
            )
        )
        return len(self.blocks) - 1


def pin_readers_of_written(folder: Folder) -> None:
    """Pin readers of buffers that the step writes to: a second run would read other values."""
    for code in folder.operators:
        for argument, k in code.reads.items():
            if k not in folder.written_resident:
                continue
            code.ordered = True
            last = folder.blocks[k].last_writer
            if last is not None and last.place < code.place:
                continue
            if not all(
                repeats_without_writing(call.target, call.args)
                for call in code.calls
                if argument in call.all_input_nodes
            ):
                name = folder.blocks[k].name
                code.pinned = code.pinned or f"reads {name}, which the step writes to"


def drop_unused(operators: list[OperatorCode], wanted: set[int]) -> list[OperatorCode]:
    """Drop operators whose results nobody reads and that change nothing."""
    needed = set(wanted)
    kept = []
    for code in reversed(operators):
        effect = code.ordered or code.pinned is not None or not code.outputs
        if effect or any(k in needed for k in code.outputs):
            needed.update(code.reads.values())
            needed.update(old for old, _ in code.clones)
            kept.append(code)
    return kept[::-1]


def _place(code: OperatorCode) -> int:
    return code.place


def item_index(item: Node) -> int:
    """Return the index of the output that a tuple getter takes."""
    index = item.args[1]
    assert isinstance(index, int)
    return index


def _getitems(node: Node) -> list[Node]:
    return sorted(
        (u for u in node.users if u.target is operator.getitem and u.args[0] is node),
        key=item_index,
    )
