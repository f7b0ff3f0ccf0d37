"""What is said once of a loop around compiled graphs that holds more than their plans count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from graph_capture.units import format_bytes

from ..errors import PlanWarning

ANOTHER_LOSS = (
    "a compiled graph has a loss, and its other results are differentiated, too: another loss, or "
    "another graph, is computed from them outside of it. What that takes is not in its plan, and "
    "the step may be that much above its budget. Compute all of the loss within the compiled "
    "function, or say what else there is by resident_bytes="
)
RETAINED = (
    "backward(retain_graph=True) through a compiled graph: what its plan saved stays in memory "
    "during and after the backward pass, which the budget does not count: its peak may be {peak}, "
    "the budget is {budget}"
)
GRADIENTS_ARE_THERE = (
    "parameters have gradients of {held} when a compiled step begins, which the plan does not "
    "count: its peak may be {peak}, the budget is {budget}. Call optimizer.zero_grad() before the "
    'forward pass, or let the plan count them, by the option grads="accumulated"'
)


class LoopWarnings:
    """Says each of them once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def of_gradients(self, held_bytes: int, peak_bytes: int, usable_bytes: int) -> None:
        """Of gradients that are there when a step begins.

        Parameters
        ----------
        held_bytes
            Their size.
        peak_bytes
            The predicted one.
        usable_bytes
            The budget without its headroom.
        """
        if held_bytes and peak_bytes + held_bytes > usable_bytes:
            peak, budget = format_bytes(peak_bytes + held_bytes), format_bytes(usable_bytes)
            self._say(GRADIENTS_ARE_THERE, held=format_bytes(held_bytes), peak=peak, budget=budget)

    def of_retained(self, saved_bytes: int, peak_bytes: int, usable_bytes: int) -> None:
        """Of a backward pass that keeps what was saved."""
        if peak_bytes + saved_bytes > usable_bytes:
            peak, budget = format_bytes(peak_bytes + saved_bytes), format_bytes(usable_bytes)
            self._say(RETAINED, peak=peak, budget=budget)

    def of_another_loss(self, gradients: Sequence[Tensor | None]) -> None:
        """Of gradients of results beside the loss; there are none of those nobody uses."""
        if any(t is not None and t.numel() > 1 for t in gradients):
            self._say(ANOTHER_LOSS)

    def _say(self, text: str, **numbers: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text.format(**numbers), PlanWarning, stacklevel=4)


__all__ = ["ANOTHER_LOSS", "GRADIENTS_ARE_THERE", "RETAINED", "LoopWarnings"]
