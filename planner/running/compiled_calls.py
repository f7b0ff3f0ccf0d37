"""What of a planned step is compiled, and why the rest is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn
from torch.fx import GraphModule

from ..plan_record import PlanRecord
from .backward_segments import Segment
from .rewrite import PlannedGraphs
from .tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledCalls:
    """How much of a planned step runs as compiled code.

    Parameters
    ----------
    stretches
        Compiled functions that a step calls.
    compiled
        Calls of operators that they took the place of; repetitions count.
    eager
        Calls that stay eager, by the reason.
    peak_bytes
        The most bytes in memory while compiled code runs, what lies there already included, as
        its code was read.
    runs
        The runs of the step's schedule of which every call is compiled.
    """

    stretches: int = 0
    compiled: int = 0
    eager: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    runs: frozenset[int] = field(default=frozenset(), repr=False)

    def __add__(self, other: CompiledCalls) -> CompiledCalls:
        return CompiledCalls(
            stretches=self.stretches + other.stretches,
            compiled=self.compiled + other.compiled,
            eager=dict(Counter(self.eager) + Counter(other.eager)),
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            runs=self.runs | other.runs,
        )

    def step_peak_bytes(self, plan: PlanRecord) -> int:
        """Predicted peak of the whole step: by the plan's replay, and by the compiled code.

        Parameters
        ----------
        plan
            Of the whole step.
        """
        eager = (n for run, n in enumerate(plan.replay.memory_bytes) if run not in self.runs)
        return max(self.peak_bytes, *eager)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, ready for JSON."""
        return {
            "stretches": self.stretches,
            "compiled_calls": self.compiled,
            "eager_calls": dict(self.eager),
            "peak_bytes": self.peak_bytes,
        }

    def __str__(self) -> str:
        total = self.compiled + sum(self.eager.values())
        text = f"{self.compiled} of {total} calls compiled, in {self.stretches} stretches"
        if not self.eager:
            return text
        listed = sorted(self.eager.items(), key=lambda item: -item[1])
        return f"{text}; eager: " + ", ".join(f"{count} ({why})" for why, count in listed)


class PlanCompiler(Protocol):
    """Compiles what can be compiled of a plan's graphs."""

    def __call__(self, plan: PlanRecord, graph: GraphModule) -> tuple[GraphModule, CompiledCalls]:
        """Return a graph that does the same within the plan's budget, and what was compiled."""


def compiled(
    compiler: PlanCompiler, plan: PlanRecord, graphs: PlannedGraphs, segments: Sequence[Segment]
) -> tuple[PlannedGraphs, tuple[Segment, ...], CompiledCalls]:
    """Compile the graphs of a step: forward, and backward or the segments of it."""
    forward, found = compiler(plan, graphs.forward)
    graphs = replace(graphs, forward=forward)
    if not segments:
        backward, more = compiler(plan, graphs.backward)
        return replace(graphs, backward=backward), (), found + more
    parts = []
    for segment in segments:
        graph, more = compiler(plan, segment.graph)
        parts.append(replace(segment, graph=graph))
        found += more
    return graphs, tuple(parts), found


def say_little_compiled(tally: Tally, model: nn.Module, found: CompiledCalls) -> None:
    """Warn where most calls of a step that was to be compiled stay eager."""
    if found.compiled < sum(found.eager.values()):
        tally.say(
            "little compiled",
            f"most calls of a planned {type(model).__name__} stay eager, though its plan is "
            f"applied with compile=True: {found}. A larger budget leaves more room, and "
            'torch.compile(model, backend="remat") plans the step that is compiled',
        )


__all__ = ["CompiledCalls", "PlanCompiler", "compiled", "say_little_compiled"]
