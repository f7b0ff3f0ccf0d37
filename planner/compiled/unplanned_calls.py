"""Training steps under ``torch.compile`` that no plan runs, and a word of them.

Dynamo asks a backend for the graphs that it makes. What it gives up on (``nn.LSTM``, a graph break
within a loop, a function that it has compiled too often, an error that it is to suppress) it runs
as plain Python, and asks nobody. So each call is looked at: operations with gradients make nodes
of autograd, which PyTorch counts. Those that are made neither by a planned graph nor while Dynamo
compiles are of plain Python.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graph_capture.private_torch.autograd import next_sequence_number
from graph_capture.private_torch.compiled_calls import hearing_of_compiles

from ..errors import PlanWarning


class _Planned(threading.local):
    """How many nodes planned graphs have made in a thread."""

    num_nodes = 0


_planned = _Planned()


def by_plan(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function of a planned graph, whose nodes are counted as planned."""

    def run(*inputs: Any) -> Any:
        before = next_sequence_number()
        try:
            return function(*inputs)
        finally:
            _planned.num_nodes += next_sequence_number() - before

    return run


class UnplannedCalls:
    """Looks at the calls of one ``torch.compile``, and says once what runs by no plan.

    Attributes
    ----------
    said
        The warnings that were given.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one call, which may compile.

        Warns
        -----
        PlanWarning
            When the call has operations with gradients that are in no planned graph.
        """
        num_compiling, began = 0, 0

        def begins() -> None:
            nonlocal began
            began = next_sequence_number()

        def ends() -> None:
            nonlocal num_compiling
            num_compiling += next_sequence_number() - began

        made, planned = next_sequence_number(), _planned.num_nodes
        with hearing_of_compiles(begins, ends):
            yield
        if sys.exc_info()[0] is not None:  # Dynamo ends contexts as if there were none
            return
        num_planned = _planned.num_nodes - planned
        num_plain = next_sequence_number() - made - num_compiling - num_planned
        if num_plain > 0:
            self._say(PARTLY_UNPLANNED if num_planned else UNPLANNED)

    def _say(self, said: str) -> None:
        if said not in self.said:
            self.said.add(said)
            warnings.warn(said, PlanWarning, stacklevel=4)


_REASONS = (
    "Dynamo may have given up on the function (nn.LSTM, for instance, or a graph break within a "
    "loop, as of batch normalization with momentum=None in an nn.Sequential; "
    "TORCH_LOGS=graph_breaks says why), compiled it as often as "
    "torch._dynamo.config.recompile_limit allows (TORCH_LOGS=recompiles), or suppressed an error; "
    "fullgraph=True makes an error of each"
)

UNPLANNED = (
    "a training step runs as plain Python, so that nothing of it is planned, and no budget holds. "
    f"{_REASONS}"
)

PARTLY_UNPLANNED = (
    "a part of a training step runs as plain Python, beside compiled graphs. What it saves is "
    "counted by graphs that come after it; what it takes while it runs, or saves after the last "
    f"graph, is in no plan, and the step may be that much above its budget. {_REASONS}"
)


__all__ = ["PARTLY_UNPLANNED", "UNPLANNED", "UnplannedCalls", "by_plan"]
