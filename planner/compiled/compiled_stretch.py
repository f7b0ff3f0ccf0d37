"""Compile a stretch of a planned graph by Inductor, and read what its code takes.

The stretch is traced on stand-ins, with writes made into results, and lowered as ever. The code
that Inductor generates is run without its kernels, which shows its peak and its results; the
same code, with its kernels compiled, then runs in the step. Stretches that do the same on
tensors of the same layout, as those of a model's layers, share their code.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.private_torch.compiler import inductor_config
from graph_capture.private_torch.dispatch import disable_current_modes
from graph_capture.private_torch.fake_tensors import FakeTensorMode
from graph_capture.private_torch.inductor import GeneratedCode, functional_graph, generate_code
from graph_capture.private_torch.trees import tree_flatten

from .generated import Boxed, compiled, runnable, zeros
from .planned_values import PlannedValues
from .stretches import NOT_LOWERED, OTHER_LAYOUT, Stretch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadStretch:
    """The code of a stretch, and what it takes.

    Parameters
    ----------
    key
        Equal for stretches that do the same.
    code
        As Inductor generated it; its kernels are not compiled.
    extra_bytes
        The most that it takes beyond what is there when it begins.
    lowered
        The functional graph that the code was generated for.
    """

    key: Any
    code: GeneratedCode
    extra_bytes: int
    lowered: Graph


class StretchCompiler:
    """Compiles stretches, each kind once."""

    def __init__(self) -> None:
        self._read: dict[Any, ReadStretch | str] = {}
        self._compiled: dict[Any, Boxed] = {}

    def read(self, values: PlannedValues, stretch: Stretch) -> ReadStretch | str:
        """Return a stretch's code and its peak, or why it cannot be compiled."""
        key = _key(values, stretch)
        if key not in self._read:
            self._read[key] = _read(key, values, stretch)
        return self._read[key]

    def compiled(self, read: ReadStretch) -> Boxed:
        """Return a stretch as a function of one list of tensors, which it empties."""
        if read.key not in self._compiled:
            self._compiled[read.key] = compiled(read.code)
        return self._compiled[read.key]


def _read(key: Any, values: PlannedValues, stretch: Stretch) -> ReadStretch | str:
    mode = FakeTensorMode()
    try:
        with disable_current_modes(), mode:
            inputs = [_like(root) for root in stretch.takes]
            module = functional_graph(_Interpreter(values, stretch), inputs)
        _forget_writes(module.graph, stretch)
        module.recompile()
        graph = Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        with disable_current_modes(), inductor_config().patch(cpp_wrapper=False):
            code = generate_code(module, inputs, is_backward=False, num_visible=len(stretch.gives))
            extra_bytes, results, given = _tried(code, inputs, stretch)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        # PyTorch's tracing and Inductor raise any of these for what they cannot do.
        logger.info("a stretch from %s is not compiled: %s", stretch.calls[0].name, error)
        return NOT_LOWERED
    if not _as_planned(results, given, stretch):
        return OTHER_LAYOUT
    return ReadStretch(key=key, code=code, extra_bytes=extra_bytes, lowered=graph)


class _Refused(RuntimeError):
    """A stretch cannot be traced as eager runs it."""


class _Interpreter:
    """Calls a stretch's operators, as eager does."""

    def __init__(self, values: PlannedValues, stretch: Stretch) -> None:
        self._values, self._stretch = values, stretch

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        known: dict[Node, Any] = dict(zip(self._stretch.takes, inputs, strict=True))
        values = self._values

        def value(node: Node) -> Any:
            node = values.as_written(node)
            if node not in known:
                if node.target is operator.getitem:
                    source, item = node.args
                    assert isinstance(source, Node)
                    return value(source)[item]
                return call(node)
            return known[node]

        def call(node: Node) -> Any:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
            return node.meta["operator"](*args, **kwargs)

        for node in self._stretch.calls:
            made = call(node)
            if values.as_written(node) is node:
                known[node] = _laid_out(made, node.meta.get("val"))
        return [value(root) for root in self._stretch.gives]


def run_eagerly(values: PlannedValues, stretch: Stretch) -> Boxed:
    """A stretch as a function that makes its calls one by one."""
    interpreter = _Interpreter(values, stretch)

    def run(boxed: list[Any]) -> Sequence[Any]:
        given = list(boxed)
        boxed.clear()
        return interpreter(*given)

    return run


def _laid_out(made: Any, planned: Any) -> Any:
    """A result in eager's layout, on which later views rely; decompositions may have another."""
    if not isinstance(made, torch.Tensor) or made.stride() == planned.stride():
        return made
    if not planned.is_contiguous():
        raise _Refused(f"a result has strides {made.stride()}, and {planned.stride()} in eager")
    return torch.ops.aten.clone.default(made, memory_format=torch.contiguous_format)


def _like(root: Node) -> torch.Tensor:
    """A stand-in of a root, without what lies around it."""
    value = root.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


def _forget_writes(graph: Graph, stretch: Stretch) -> None:
    """Drop what is written back to inputs that nobody reads later."""
    placeholders = graph.find_nodes(op="placeholder")
    unread = {
        node
        for node, root in zip(placeholders, stretch.takes, strict=True)
        if root in stretch.last_read
    }
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.copy_.default and node.args[0] in unread:
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _tried(
    code: GeneratedCode, inputs: Sequence[torch.Tensor], stretch: Stretch
) -> tuple[int, Sequence[Any], list[torch.Tensor]]:
    """The peak of generated code, its results, and what it was given."""
    call = runnable(code)
    results: list[Any] = []
    held: list[torch.Tensor] = []
    inputs_bytes = 0

    def step() -> None:
        nonlocal inputs_bytes
        boxed = [zeros(stand_in) for stand_in in inputs]
        inputs_bytes = sum(tensor.untyped_storage().nbytes() for tensor in boxed)
        held.extend(
            t for t, n in zip(boxed, stretch.takes, strict=True) if n not in stretch.last_read
        )
        results.extend(call(boxed))

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        peak_bytes = peak_extra_bytes(step)
    return peak_bytes - inputs_bytes, results, held


def _as_planned(results: Sequence[Any], held: Sequence[torch.Tensor], stretch: Stretch) -> bool:
    """Whether results have the layout and the memory that the plan counts on."""
    memories = [t.untyped_storage().data_ptr() for t in (*results, *held) if t.numel()]
    if len(set(memories)) < len(memories):
        return False
    return all(
        made.shape == planned.shape
        and made.stride() == planned.stride()
        and made.dtype == planned.dtype
        and made.untyped_storage().nbytes() <= planned.untyped_storage().nbytes()
        for made, planned in zip(results, (n.meta["val"] for n in stretch.gives), strict=True)
    )


def _key(values: PlannedValues, stretch: Stretch) -> Any:
    """What a stretch's code depends on."""
    places: dict[Node, int] = {root: i for i, root in enumerate(stretch.takes)}
    written: list[Any] = []

    def place(node: Node) -> int:
        node = values.as_written(node)
        if node not in places:
            written.append(_call_key(node, place))
            places[node] = len(places)
        return places[node]

    for call in stretch.calls:
        if values.as_written(call) is call:
            place(call)
        else:
            written.append(_call_key(call, place))
    return (
        tuple((_layout(root), root in stretch.last_read) for root in stretch.takes),
        tuple(written),
        tuple(map(place, stretch.gives)),
        torch.get_num_threads(),
    )


def _call_key(node: Node, place: Any) -> Any:
    what = node.meta.get("operator", node.target)
    leaves, spec = tree_flatten((node.args, dict(node.kwargs)))
    said = [("node", place(x)) if isinstance(x, Node) else (type(x), repr(x)) for x in leaves]
    return str(what), str(spec), tuple(said)


def _layout(root: Node) -> Any:
    value: torch.Tensor = root.meta["val"]
    return tuple(value.shape), value.stride(), value.dtype


__all__ = ["ReadStretch", "StretchCompiler"]
