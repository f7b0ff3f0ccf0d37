"""Calls in a planned step that check values against those it was planned for.

A check stands in the traced graph where the code asked for the value. An operator
without outputs is pinned and keeps its place, so each check runs once, at the point
where eager would have asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..private_torch.operators import OpOverload, schema_of
from .outcomes import same_number

NAMESPACE = "remat"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("expect_number(Tensor asked, Scalar planned, int place) -> ()")
_library.define("expect_equal(Tensor a, Tensor b, bool planned, int place) -> ()")
_library.define("expect_shape(Tensor made, int[] planned, int place) -> ()")
_library.define("expect_values(Tensor asked, Tensor planned, int place) -> ()")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A value that a planned step checks, to see whether the plan still applies.

    Parameters
    ----------
    what
        What the code asked for, in words.
    source
        The line that asked.
    module_path
        The module that the line belongs to.
    state
        A buffer or attribute that the value depends on, if there is one.
    next_step
        In words, why other steps may find another value though nothing changes;
        empty if unknown.
    """

    what: str
    source: str
    module_path: str
    state: str | None = None
    next_step: str = ""


class OutcomeChanged(Exception):  # a signal that never reaches users
    """A check did not find the planned value.

    Parameters
    ----------
    place
        Index of the check.
    planned, got
        The two values, for the message.
    """

    def __init__(self, place: int, planned: Any, got: Any) -> None:
        super().__init__(f"check {place}: planned was {planned}, got {got}")
        self.place = place
        self.planned = planned
        self.got = got


def _expect_number(asked: torch.Tensor, planned: Any, place: int) -> None:
    got = asked.item()
    if not same_number(got, planned):
        raise OutcomeChanged(place, planned, got)


def _expect_equal(a: torch.Tensor, b: torch.Tensor, planned: bool, place: int) -> None:
    got = torch.equal(a, b)
    if got is not planned:
        raise OutcomeChanged(place, planned, got)


def _expect_shape(made: torch.Tensor, planned: Sequence[int], place: int) -> None:
    if list(made.shape) != list(planned):
        raise OutcomeChanged(place, f"shape {list(planned)}", f"shape {list(made.shape)}")


def _expect_values(asked: torch.Tensor, planned: torch.Tensor, place: int) -> None:
    got = asked.cpu()
    if torch.equal(got, planned):
        return
    both_nan = (got != got) & (planned != planned)
    if not bool(((got == planned) | both_nan).all()):
        raise OutcomeChanged(place, _short(planned), _short(got))


def _short(values: torch.Tensor) -> str:
    shown = values.flatten()[:8].tolist()
    return f"{shown}" if values.numel() <= 8 else f"{shown} and {values.numel() - 8} more"


_library.impl("expect_number", _expect_number, "CompositeExplicitAutograd")
_library.impl("expect_equal", _expect_equal, "CompositeExplicitAutograd")
_library.impl("expect_shape", _expect_shape, "CompositeExplicitAutograd")
_library.impl("expect_values", _expect_values, "CompositeExplicitAutograd")

expect_number = torch.ops.remat.expect_number.default
expect_equal = torch.ops.remat.expect_equal.default
expect_shape = torch.ops.remat.expect_shape.default
expect_values = torch.ops.remat.expect_values.default


def is_check(target: Any) -> bool:
    """Whether a call of a traced graph is a check."""
    return isinstance(target, OpOverload) and schema_of(target).name.startswith(
        f"{NAMESPACE}::expect_"
    )


__all__ = [
    "Check",
    "OutcomeChanged",
    "expect_equal",
    "expect_number",
    "expect_shape",
    "expect_values",
    "is_check",
]
