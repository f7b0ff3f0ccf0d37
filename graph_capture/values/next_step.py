"""Predict whether a value that decides a model's path will differ in the next step.

A plan holds for one path. Most answers hold from step to step: that labels lie in
range, that a mask has no gap. Two kinds do not, and are detected while planning:

- what random numbers decide without parameters, such as
  ``torch.rand([]) < layerdrop``: the question is asked again with other draws;
- what forward itself prepares, such as ``if not self.initialized``: the question is
  asked again with the buffers that the step leaves behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .outcomes import Outcome, same_number
from .sample_values import Other, SampleValues, UnknowableError

NUM_DRAWS = 256
"""A path that one step in a hundred takes is missed with a probability of 8 %."""

MAX_ELEMENTS = 2**22
"""The most elements of all results that are recomputed for one question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question that can be asked again.

    Parameters
    ----------
    func, args, kwargs
        The call on nodes; without ``func``, a tensor that was read as a whole.
    part
        The nodes that the answer depended on when the question was asked.
    outcome
        The answer.
    place
        Index of the check of this answer.
    """

    func: Any
    args: tuple
    kwargs: Mapping[str, Any]
    part: frozenset[Node]
    outcome: Outcome
    place: int

    def other_answers(self, values: SampleValues, others: Iterable[Other]) -> int:
        """How many of the other steps give another answer."""
        call = (self.func, self.args, self.kwargs)
        return sum(not self._is(x) for x in values.again(self.part, call, others))

    def _is(self, found: Any) -> bool:
        if self.outcome.number is not None:
            return same_number(found, self.outcome.number)
        assert self.outcome.values is not None
        pairs = zip(found.flatten().tolist(), self.outcome.values, strict=True)
        return all(same_number(a, b) for a, b in pairs)


def by_chance(values: SampleValues, question: Asked) -> str:
    """In words, how often other draws give another answer; empty if none did."""
    elements = sum(
        n.meta["val"].numel()
        for n in question.part
        if n.op != "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
    )
    num_draws = min(NUM_DRAWS, MAX_ELEMENTS // max(elements, 1))
    try:
        others = (Other(seed=seed) for seed in range(num_draws))
        num_others = question.other_answers(values, others)
    except UnknowableError:
        return ""
    if not num_others:
        return ""
    return (
        f"random numbers decide it, and {num_others} of {num_draws} other draws do otherwise. Set "
        "the rate at which layers are dropped to 0, or plan each such layer by itself"
    )


def prepared(
    values: SampleValues, asked: Sequence[Asked], state_after: Mapping[str, Node]
) -> dict[int, str]:
    """In words, by the place of a check: what it depends on that the step itself changes.

    Parameters
    ----------
    state_after
        By name, what forward leaves in the buffers and attributes that it changes.
    """
    concerned = [(q, names) for q in asked if (names := _state_in(q.part) & state_after.keys())]
    if not concerned:
        return {}
    wanted = sorted({name for _, names in concerned for name in names})
    try:
        after = values.tensors([state_after[name] for name in wanted])
    except UnknowableError:
        return {}
    found = {}
    for question, names in concerned:
        held = [n for n in question.part if n.op == "placeholder" and n.meta["target"] in names]
        given = {n: after[state_after[n.meta["target"]]] for n in held}
        try:
            other = question.other_answers(values, [Other(state=given)])
        except UnknowableError:
            continue
        if other:
            found[question.place] = (
                f"it follows from {min(names)!r}, which the step itself changes. Where only a "
                "first step does so, run the model once before planning"
            )
    return found


def _state_in(part: frozenset[Node]) -> set[str]:
    return {
        n.meta["target"]
        for n in part
        if n.op == "placeholder" and n.meta["role"] in ("buffer", "attribute")
    }


__all__ = ["Asked", "by_chance", "prepared"]
