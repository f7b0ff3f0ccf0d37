"""Find the stretches of a planned graph that Inductor may take.

A stretch is a run of calls, one after the other, of operators whose results depend on nothing
but their arguments: arithmetic, reductions, normalizations, copies, matrix products, indexing
by slices and masks. Between stretches stay, as eager calls: draws of random numbers, with the
generator's states around them; indexing by the numbers of a tensor, since one out of range is an
error in eager, and ends the process where several threads run compiled code; convolutions,
attention and other kernels of libraries that choose by layout or grad mode; operators that are
not PyTorch's; checks; writes to memory that something else may look at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from graph_capture.calls.writes import hidden_writes
from graph_capture.costs.operator_classes import (
    COPY,
    ELEMENTWISE,
    INDEXING,
    NORMALIZATION,
    REDUCTION,
    operator_class,
)
from graph_capture.private_torch.operators import OpOverload, schema_of
from graph_capture.private_torch.trees import tree_leaves

from .planned_values import PlannedValues, written_by

DRAWS = "draw random numbers"
OF_A_LIBRARY = "kernels of libraries"
BY_NUMBERS = "index by a tensor's numbers"
NOT_PYTORCHS = "not PyTorch's, or checks"
WRITES = "write to memory that others may see"
NO_GAIN = "nothing beside them to fuse with"
NO_ROOM = "no room in the budget for the compiled stretch"
OTHER_LAYOUT = "results that the compiled stretch would lay out otherwise"

NOT_LOWERED = "what Inductor does not compile"

LEAST_FUSED = 2
"""A stretch with fewer calls that Inductor writes itself is not worth compiling."""

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
}
_OWN_LOOPS = {ELEMENTWISE, REDUCTION, NORMALIZATION, INDEXING, COPY}


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Calls that are compiled together, and what they take and give.

    Parameters
    ----------
    calls
        In order.
    takes
        Roots that they read, made before.
    gives
        Roots that they make, for later.
    last_read
        Of ``takes``, those that nobody reads later or holds.
    """

    calls: tuple[Node, ...]
    takes: tuple[Node, ...]
    gives: tuple[Node, ...]
    last_read: frozenset[Node]


class Stretches:
    """Divides a planned graph; ``left`` counts calls that stay eager, by the reason."""

    def __init__(self, values: PlannedValues) -> None:
        self._values = values
        self.left: Counter[str] = Counter()
        self._made_at: dict[Node, int] = {}
        self._last_read: dict[Node, int] = {}
        calls = values.calls
        for i, call in enumerate(calls):
            self._made_at.update(dict.fromkeys(values.made(call), i))
            self._last_read.update(dict.fromkeys(values.roots(call), i))
        for node in values.results:
            self._last_read[values.root(node)] = len(calls)

    def find(self, take: Callable[[Stretch], str | None]) -> list[Stretch]:
        """Return the stretches that are taken, in order.

        Parameters
        ----------
        take
            Returns why a stretch cannot be compiled as it is; it is then offered in halves.
        """
        taken: list[Stretch] = []
        start = 0
        calls = self._values.calls
        reasons = [self._reason(call) for call in calls]
        for end in range(len(calls) + 1):
            if end < len(calls) and reasons[end] is None:
                continue
            self._offer(start, end, take, taken)
            if end < len(calls):
                self.left[reasons[end] or ""] += 1
            start = end + 1
        return taken

    def _offer(
        self, start: int, end: int, take: Callable[[Stretch], str | None], taken: list[Stretch]
    ) -> None:
        calls = self._values.calls
        while start < end and _is_product(calls[start]):
            start += 1
            self.left[NO_GAIN] += 1
        while start < end and _is_product(calls[end - 1]):
            end -= 1
            self.left[NO_GAIN] += 1
        fused = [i for i in range(start, end) if not _is_product(calls[i])]
        if len(fused) < LEAST_FUSED:
            self.left[NO_GAIN] += end - start
            return
        stretch = self._between(start, end)
        why = take(stretch)
        if why is None:
            taken.append(stretch)
        elif len(fused) < 2 * LEAST_FUSED:
            self.left[why] += end - start
        else:
            middle = fused[len(fused) // 2]
            self._offer(start, middle, take, taken)
            self._offer(middle, end, take, taken)

    def _between(self, start: int, end: int) -> Stretch:
        values, calls = self._values, self._values.calls[start:end]
        read = dict.fromkeys(root for call in calls for root in values.roots(call))
        takes = [root for root in read if not start <= self._made_at.get(root, -1) < end]
        made = [root for call in calls for root in values.made(call)]
        return Stretch(
            calls=tuple(calls),
            takes=tuple(takes),
            gives=tuple(root for root in made if self._last_read.get(root, -1) >= end),
            last_read=frozenset(root for root in takes if self._ends_before(root, end)),
        )

    def _ends_before(self, root: Node, end: int) -> bool:
        """Whether a root's memory is free once the calls before ``end`` have run."""
        held = root.meta.get("held", False) or not self._values.is_alone(root)
        return self._last_read[root] < end and not held

    def _reason(self, call: Node) -> str | None:
        """Why a call has to stay eager, or ``None``."""
        func = call.meta.get("operator")
        if not isinstance(func, OpOverload) or func.namespace != "aten":
            return NOT_PYTORCHS
        if torch.Tag.nondeterministic_seeded in func.tags:
            return DRAWS
        if not _is_product(call):
            if operator_class(func) not in _OWN_LOOPS or func in _OUTSIDE:
                return OF_A_LIBRARY
            if schema_of(func).name.startswith(("aten::empty", "aten::new_empty")):
                return NO_GAIN
            involves_numbers = any(map(_is_of_integers, self._values.roots(call)))
            if operator_class(func) == INDEXING and involves_numbers:
                return BY_NUMBERS
        if hidden_writes(func, call.args):
            return WRITES
        values = self._values
        involved = [*values.roots(call), *values.made(call)]
        if not all(map(_is_plain, involved)) or not all(map(values.is_clear, involved)):
            return NOT_PYTORCHS
        written = written_by(call)
        if len(written) > 1 or (written and values.made(call)):
            return WRITES
        if not all(values.is_alone(values.root(n)) for n in written):
            return WRITES
        return None


_OUTSIDE = {  # their kernels differ by grad mode, or choose for later calls
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten.native_batch_norm_backward.default,
}


def _is_of_integers(root: Node) -> bool:
    value = root.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


def _is_product(call: Node) -> bool:
    return call.meta.get("operator") in _PRODUCTS


def _is_plain(root: Node) -> bool:
    """Whether a value is a tensor of the CPU with memory of the usual kind."""
    value = root.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and not value.is_neg()
        and all(isinstance(n, int) for n in tree_leaves((tuple(value.shape), value.stride())))
    )


__all__ = ["Stretch", "Stretches"]
