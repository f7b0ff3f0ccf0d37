"""What was solved and read of a graph before: a budget near another one asks for the same again.

A reading depends on the graph, the memory that was asked for, how hard the search was and the
settings of Inductor, and on nothing else. So it is kept, for the next budget of the same model in
the same process, and for the budget that an error named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from graph_capture.private_torch.compiler import functorch_settings, inductor_settings
from graph_capture.private_torch.trees import tree_leaves
from solvers.result import SolveResult
from solvers.schedule import Schedule

from ..base.solve_options import SolveOptions
from .priced_step import PricedStep

MOST_KEPT = 512


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A solved graph, and the peak of the code that Inductor generates for it.

    Parameters
    ----------
    result
        Of the solver, with a schedule.
    peak_bytes
        Of the compiled step, resident tensors included.
    needed_bytes
        That, or more where other calls of the graph have to have room.
    """

    result: SolveResult
    peak_bytes: int
    needed_bytes: int

    @property
    def cost_ns(self) -> int:
        """Estimated time of the step."""
        assert self.result.cost_ns is not None
        return self.result.cost_ns


_Value = TypeVar("_Value")


class _Kept(dict[tuple[object, ...], _Value]):
    """What was made last, by what it depends on."""

    def get_or_make(self, key: tuple[object, ...], make: Callable[[], _Value]) -> _Value:
        value = self.pop(key) if key in self else make()
        self[key] = value
        while len(self) > MOST_KEPT:
            self.pop(next(iter(self)), None)
        return value


_results: _Kept[SolveResult] = _Kept()
_peaks: _Kept[int] = _Kept()


def result_of(
    code: str, target_bytes: int, solving: SolveOptions, make: Callable[[], SolveResult]
) -> SolveResult:
    """The solution for a target, made where it is not known.

    Parameters
    ----------
    code
        What :func:`name_of` says of the step.
    """
    return _results.get_or_make((code, target_bytes, solving), make)


def peak_of(code: str, schedule: Schedule | None, make: Callable[[], int]) -> int:
    """The peak of a schedule's code, read where it is not known: two targets may have one.

    Parameters
    ----------
    schedule
        ``None`` for PyTorch's own partition.
    """
    return _peaks.get_or_make((code, schedule), make)


def name_of(priced: PricedStep) -> str:
    """A name of all that the generated code of a step's schedules depends on.

    It is the same in each process.
    """
    settings = inductor_settings(), functorch_settings()
    digest = hashlib.sha256(f"{priced.graph.to_json()} {settings}".encode())
    module = priced.step.module
    graphs = [part.graph for part in module.modules() if isinstance(part, GraphModule)]  # branches
    regions: dict[object, int] = {}  # counted from 0, as the process counts on
    for node in (n for graph in graphs for n in graph.nodes):
        read = tuple(map(str, (node.args, node.kwargs)))
        tag = node.meta.get("recompute")  # by a checkpoint; PyTorch's own partition obeys it
        region = regions.setdefault(node.meta.get("ac_graph_id"), len(regions))
        shown = (
            node.op,
            node.name,
            str(node.target),
            read,
            str(tag),
            region,
            *_shown(node.meta.get("val")),
        )
        digest.update(repr(shown).encode())
    return digest.hexdigest()


def _shown(value: Any) -> Iterator[str]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield f"{leaf.dtype} {leaf.device} {leaf.shape} {leaf.stride()} {leaf.storage_offset()}"
        else:
            yield str(leaf)


__all__ = ["Reading", "name_of", "peak_of", "result_of"]
