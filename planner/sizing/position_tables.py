"""Refuse sequences that are longer than a table of learned positions.

A lookup of row 512 in a table of 512 rows fails in eager execution. On stand-ins, whose
values are unknown, it does not. But positions counted by ``arange`` are known: they are
followed from there to the lookup through views, casts and additions of numbers.
Positions made in another way (a running sum of the attention mask, an input) are not
detected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from graph_capture.private_torch.operators import OpOverload, schema_of

# Calls that pass on the values of their first argument, or some of them.
_HAND_ON = {
    "aten::_to_copy",
    "aten::_unsafe_view",
    "aten::alias",
    "aten::clone",
    "aten::detach",
    "aten::expand",
    "aten::repeat",
    "aten::reshape",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::view",
}


def refuse_short_tables(captured: CapturedStep) -> None:
    """Raise as eager execution would at an embedding that has too few rows.

    Raises
    ------
    CaptureError
        When counted positions go beyond the table that they are looked up in.
    """
    for node in captured.step.graph.find_nodes(
        op="call_function", target=torch.ops.aten.embedding.default
    ):
        table, places = node.args[:2]
        largest = largest_counted(places)
        num_rows = table.meta["val"].shape[0]
        if largest is not None and largest >= num_rows:
            raise CaptureError(
                f"IndexError: {node.meta['module_path']!r} looks up position {largest:.0f} in a "
                f"table of {num_rows} rows; a sequence of this length needs more positions"
            )


def largest_counted(value: Any) -> float | None:
    """The largest of the numbers that an ``arange`` counted; ``None`` if they are not known."""
    if not isinstance(value, Node) or not isinstance(value.target, OpOverload):
        return None
    name = schema_of(value.target).name
    if name == "aten::arange":
        return _last(value.args)
    if name in _HAND_ON:
        return largest_counted(value.args[0])
    if name == "aten::add" and isinstance(value.args[1], (int, float)):
        largest = largest_counted(value.args[0])
        factor = value.kwargs.get("alpha", 1)
        if largest is not None and isinstance(factor, (int, float)):
            return largest + factor * value.args[1]
    return None


def _last(args: tuple[Any, ...]) -> float | None:
    """The largest number of ``arange(end)``, ``(start, end)`` or ``(start, end, step)``."""
    numbers = [x for x in args if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if len(numbers) != len(args) or not 1 <= len(numbers) <= 3:
        return None
    start, end = (0, numbers[0]) if len(numbers) == 1 else numbers[:2]
    step = numbers[2] if len(numbers) == 3 else 1
    if step <= 0 or end <= start:
        return None
    return start + step * ((end - start - 1) // step)
