"""One step at any batch size from two captures, and the largest batch within a rule.

Sizes are affine in the batch and so, by the roofline, are times of calls that are not
bound by their launch (:mod:`planner.sizing.fitting`). A search therefore does not need a
capture for each batch; only its answer is captured and checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graph_capture.cost_graph import CostGraph
from planner.sizing.fitting import wiring_of
from solvers.replay import replay
from solvers.schedule import Schedule

from ..models import Subject
from .questions import (
    captured_graph,
    forward_ns,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Limits of a step.

    Parameters
    ----------
    budget_bytes
        Limit of the peak.
    extra_forwards
        The most forward passes that may be run again: the time may be that of the step
        plus this many forward passes. Jain et al. allow one.
    """

    budget_bytes: int
    extra_forwards: float = 1.0

    def cost_limit_ns(self, graph: CostGraph) -> int:
        """The longest time allowed."""
        return graph.base_cost_ns + int(self.extra_forwards * forward_ns(graph))

    def allows(self, graph: CostGraph, schedule: Schedule) -> bool:
        """Whether a schedule is within the limits."""
        outcome = replay(graph, schedule)
        within = outcome.peak_bytes <= self.budget_bytes
        return within and outcome.cost_ns <= self.cost_limit_ns(graph)


class StepLine:
    """The step of a subject at every batch size.

    Parameters
    ----------
    capture
        From a batch size to a step.
    first, second
        The batch sizes that are captured.

    Raises
    ------
    ValueError
        When the two steps do not have the same wiring.
    """

    def __init__(self, capture: Callable[[int], CostGraph], first: int, second: int) -> None:
        self._capture = capture
        self._ends = (first, second)
        self._captured: dict[int, CostGraph] = {}
        if wiring_of(self.captured(first)) != wiring_of(self.captured(second)):
            raise ValueError(
                f"the steps at batch {first} and {second} are not of the same wiring; choose others"
            )

    @classmethod
    def of(cls, subject: Subject, device: object, first: int = 32, second: int = 64) -> StepLine:
        """The step of a subject on ``meta``, for a device."""
        model = subject.build("meta")

        def capture(batch: int) -> CostGraph:
            sample = subject.sample(device="meta", batch=batch)
            return captured_graph(model, sample, device=device)  # type: ignore[arg-type]

        return cls(capture, first, second)

    def captured(self, batch: int) -> CostGraph:
        """The step as captured at this batch size."""
        if batch not in self._captured:
            self._captured[batch] = self._capture(batch)
        return self._captured[batch]

    def at(self, batch: int) -> CostGraph:
        """The step at this batch size, on the line through the two captures."""
        first, second = self._ends
        low, high = self.captured(first), self.captured(second)
        share = (batch - first) / (second - first)

        def between(a: int, b: int) -> int:
            return max(0, round(a + (b - a) * share))

        operators = tuple(
            replace(
                op,
                cost_ns=between(op.cost_ns, other.cost_ns),
                workspace_bytes=between(op.workspace_bytes, other.workspace_bytes),
                rewrites=tuple(
                    (old, new, between(ns, other_ns))
                    for (old, new, ns), (_, _, other_ns) in zip(
                        op.rewrites, other.rewrites, strict=True
                    )
                ),
            )
            for op, other in zip(low.operators, high.operators, strict=True)
        )
        storages = tuple(
            replace(s, size_bytes=between(s.size_bytes, other.size_bytes))
            for s, other in zip(low.storages, high.storages, strict=True)
        )
        return CostGraph(operators, storages)


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestBatch:
    """The largest batch that a strategy is known to reach.

    Parameters
    ----------
    batch
        0 if it reaches none.
    excluded
        The least batch proven to be out of reach; ``None`` if none is. The proof is for
        the step on the line through the two captures, not for a capture at that batch.
    peak_bytes, overhead
        Of its schedule at ``batch``, on the step captured there.
    """

    batch: int
    excluded: int | None = None
    peak_bytes: int | None = None
    overhead: float | None = None


BEYOND = (1.05, 1.1, 1.25, 1.5, 2.0, 3.0)
"""Multiples of the largest batch that are tried for a proof if the search had none."""

Find = Callable[[CostGraph, Rule, Schedule | None], tuple[Schedule | None, bool]]
"""Maps a step, the rule and a schedule of a smaller batch to a schedule within the rule
(or ``None``), and whether it is proven that there is none."""


def largest_batch(
    line: StepLine, rule: Rule, find: Find, *, start: int = 1, prove: bool = False
) -> LargestBatch:
    """The largest batch at which ``find`` stays within the rule, by doubling and halving.

    Assumes that what is within the rule at a batch is also within it at smaller ones.

    Parameters
    ----------
    start
        The first batch to try.
    prove
        Whether to look for a larger batch that is proven to be out of reach, if that is
        open for the next one.
    """
    fitting, schedule = 0, None
    too_large: int | None = None
    excluded: int | None = None
    batch = max(1, start)
    while too_large is None or too_large - fitting > 1:
        found, proven = find(line.at(batch), rule, schedule)
        if found is not None and batch > fitting:
            fitting, schedule = batch, found
        elif found is None:
            too_large = batch
            if proven:
                excluded = batch
        step = max(1, fitting // 4)
        batch = fitting + step if too_large is None else (fitting + too_large) // 2
    for multiple in BEYOND if prove and fitting and excluded is None else ():
        batch = max(too_large + 1, round(multiple * fitting))
        if find(line.at(batch), rule, schedule)[1]:
            excluded = batch
            break
    # The batch on the line is checked by a capture; rounding may lower it by one or two.
    while fitting and schedule is not None:
        graph = line.captured(fitting)
        if rule.allows(graph, schedule):
            outcome = replay(graph, schedule)
            return LargestBatch(
                batch=fitting,
                excluded=excluded,
                peak_bytes=outcome.peak_bytes,
                overhead=outcome.cost_ns / graph.base_cost_ns - 1,
            )
        fitting -= 1
    return LargestBatch(batch=0, excluded=excluded)
