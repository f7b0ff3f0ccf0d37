"""What the earlier graphs of a step hold while later ones run.

A graph break cuts a training step into graphs that are compiled one after the other. Forward of
the first runs before forward of the second, backward of the first after backward of the second.
So while a later graph runs, what earlier ones take as inputs and save is there; and while an
earlier backward runs, the later graph's inputs and gradients are. The first is known when a
later graph is planned, and counts in its plan. The second is not known when the earlier one is:
it is checked, and a step that does not fit as a whole is an error.

This goes by plans alone, for graphs that are compiled before any of them has run: those into which
PyTorch cuts a step for the buckets of ``DistributedDataParallel``. Otherwise earlier graphs have
run, and what they hold is looked at (:mod:`planner.compiled.pending_calls`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from graph_capture.units import format_bytes

from ..errors import PlanError
from .compiled_plan import CompiledPlan
from .pending_calls import PendingCalls


@dataclass(frozen=True, kw_only=True)
class Part:
    """A graph of a step, planned.

    Parameters
    ----------
    own_bytes
        Its inputs, without what earlier graphs hold.
    peak_bytes
        The predicted one, of this graph with what earlier ones hold.
    saved_bytes
        What it makes in forward that is there until its backward, outputs included.
    gradient_bytes
        What it makes in backward that is there at its end.
    output_bytes
        Of each output; a later graph counts those that it takes among its own inputs.
    """

    own_bytes: int
    peak_bytes: int
    saved_bytes: int
    gradient_bytes: int
    output_bytes: tuple[int, ...]

    @classmethod
    def of(cls, plan: CompiledPlan, added_bytes: int) -> Part:
        """Read a plan that counted ``added_bytes`` beside its graph."""
        storages = plan.graph.storages
        return cls(
            own_bytes=plan.graph.resident_bytes - added_bytes,
            peak_bytes=plan.predicted_peak_bytes,
            saved_bytes=plan.saved_bytes,
            gradient_bytes=sum(
                s.size_bytes
                for s in storages
                if s.kept and s.category == "gradient" and s.producer != plan.turn
            ),
            output_bytes=tuple(s.size_bytes for s in storages if s.category == "output"),
        )


@dataclass(kw_only=True)
class StepSoFar:
    """The graphs that were planned since the last one that began a step, and calls that wait."""

    parts: list[Part] = field(default_factory=list)
    calls: PendingCalls = field(default_factory=PendingCalls)

    def held_bytes(self, taken_bytes: Sequence[int]) -> int:
        """What earlier graphs hold beside the memory that a later one takes from them.

        Parameters
        ----------
        taken_bytes
            Of each input of the later graph that another graph made.
        """
        held = sum(part.own_bytes + part.saved_bytes for part in self.parts)
        made = Counter(n for part in self.parts for n in part.output_bytes)
        return held - sum(n * k for n, k in (made & Counter(taken_bytes)).items())

    def add(
        self, part: Part, taken_bytes: Sequence[int], budget_bytes: int, later_bytes: int
    ) -> None:
        """Note one more graph.

        Parameters
        ----------
        later_bytes
            What the plans of graphs without a loss have counted for later ones.

        Raises
        ------
        PlanError
            When the step is above the budget while an earlier graph's backward runs.
        """
        # Memory that the earlier graph made, and its gradient, are in its own plan.
        own_bytes = part.own_bytes + part.gradient_bytes - 2 * sum(taken_bytes)
        needed_bytes = own_bytes + sum(part.output_bytes)
        for i, earlier in enumerate(self.parts):
            over_bytes = earlier.peak_bytes - later_bytes + needed_bytes - budget_bytes
            if over_bytes > 0:
                raise PlanError(
                    f"a graph break cuts the step: while graph {i} runs, a later graph holds "
                    f"{format_bytes(needed_bytes)}, with which the step is "
                    f"{format_bytes(over_bytes)} above its budget of {format_bytes(budget_bytes)}. "
                    f"Let the plans count it, by the option later_bytes={needed_bytes}, or compile "
                    "without breaks (fullgraph=True shows them)"
                )
        self.parts.append(part)


__all__ = ["Part", "StepSoFar"]
