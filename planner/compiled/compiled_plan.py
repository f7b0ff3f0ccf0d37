"""What was decided for one compiled graph, and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from graph_capture.cost_graph import CostGraph
from graph_capture.units import format_bytes
from solvers.replay import replay
from solvers.result import SolveStatus, relative_gap
from solvers.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class CompiledPlan:
    """The plan of one graph that ``torch.compile`` made of a model.

    Parameters
    ----------
    graph
        The joint graph of forward and backward as a cost graph.
    schedule
        Its runs before operator ``turn`` are forward, the others backward.
    turn
        The operator between forward and backward.
    lower
        What the graphs are compiled with.
    budget_bytes, headroom_bytes
        As asked for.
    predicted_peak_bytes
        Of forward and backward, resident tensors included: of the schedule with eager
        kernels, of the compiled code with Inductor.
    unplanned_peak_bytes
        The same without a budget: of PyTorch's own partition where its code was read, which is
        where it may fit, else of the cost graph if everything were kept.
    lower_bound_ns
        No schedule of ``graph`` within the memory that was given to the solver takes less.
    status
        How the solve ended.
    solve_s
        Seconds of solving, in all rounds.
    planning_s
        Seconds from the joint graph to forward and backward, solving and reading generated code
        included.
    notes
        What a reader of the figures must know.
    """

    graph: CostGraph
    schedule: Schedule
    turn: int
    lower: str
    budget_bytes: int
    headroom_bytes: int
    predicted_peak_bytes: int
    unplanned_peak_bytes: int
    lower_bound_ns: int
    status: SolveStatus
    solve_s: float
    planning_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def usable_bytes(self) -> int:
        """The budget without its headroom."""
        return self.budget_bytes - self.headroom_bytes

    @property
    def step_ns(self) -> int:
        """Estimated time of the step."""
        return replay(self.graph, self.schedule).cost_ns

    @property
    def gap(self) -> float:
        """``(time - bound) / bound``."""
        return relative_gap(self.step_ns, self.lower_bound_ns)

    @property
    def overhead(self) -> float:
        """Estimated time of the repetitions, as a share of the step's that keeps everything."""
        base_ns = self.graph.base_cost_ns
        return (self.step_ns - base_ns) / base_ns if base_ns else 0.0

    @property
    def num_recomputed(self) -> int:
        """How many operators run more than once."""
        return len(self.schedule.recomputed())

    @property
    def saved_bytes(self) -> int:
        """What is alive between forward and backward, beside resident tensors."""
        return saved_between(self.graph, self.schedule, self.turn)

    @property
    def held_output_bytes(self) -> int:
        """What the caller holds of the graph's results until the step ends."""
        storages = self.graph.storages
        return sum(s.size_bytes for s in storages if s.category == "output" and s.kept)

    def __str__(self) -> str:
        text = (
            f"compiled plan ({self.lower}): peak {format_bytes(self.predicted_peak_bytes)} of "
            f"{format_bytes(self.budget_bytes)} ({format_bytes(self.unplanned_peak_bytes)} "
            f"unplanned), {format_bytes(self.saved_bytes)} saved, "
            f"{self.num_recomputed} of {self.graph.num_operators} operators recomputed, "
            f"estimated time +{self.overhead:.1%}, gap {self.gap:.2%}, "
            f"solved in {self.solve_s:.1f} s"
        )
        return "; ".join((text, *self.notes))


def saved_between(graph: CostGraph, schedule: Schedule, turn: int) -> int:
    """What is alive between forward and backward, beside resident tensors and gradients."""
    live = replay(graph, schedule).live_at(schedule.order.index(turn))
    made_before = [k for k in live if graph.storages[k].producer not in (None, turn)]
    return sum(graph.storages[k].size_bytes for k in made_before)


__all__ = ["CompiledPlan", "saved_between"]
