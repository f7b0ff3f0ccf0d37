"""What each rank of a mesh holds and sends, in words, for ``print(estimate_mesh(…))``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from graph_capture.units import format_bytes, format_us
from solvers.pipeline import PipelineSchedule

from ..plan_record import PeakMemory, PlanRecord
from .communication import Traffic
from .mesh import Mesh

PlanT = TypeVar("PlanT", bound=PlanRecord)
"""The type of the plans that the caller gets: :class:`planner.Plan`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate(Generic[PlanT]):
    """One stage of the pipeline; all of its ranks are alike.

    Parameters
    ----------
    stage
        Its number.
    layers
        The first layer and the one after the last; ``None`` where the model is one stage.
    in_flight
        How many micro-batches it has run forward before the first one's backward.
    unplanned
        Memory at the peak of its step without a plan.
    memory
        The same by the plan; equal to ``unplanned`` where that fits, ``None`` where no plan
        is known to fit.
    plan
        ``None`` where none is needed, or none is known to fit.
    least_budget_bytes
        Where nothing fits, the least budget known to work.
    forward_us, backward_us
        Time of the two passes of one micro-batch, without communication.
    optimizer_us
        Time of the optimizer's step.
    traffic
        What a rank sends in a step.
    """

    stage: int
    layers: tuple[int, int] | None
    in_flight: int
    unplanned: PeakMemory
    memory: PeakMemory | None
    plan: PlanT | None
    least_budget_bytes: int | None
    forward_us: float
    backward_us: float
    optimizer_us: float
    traffic: tuple[Traffic, ...]

    @property
    def microbatch_us(self) -> float:
        """Time of forward and backward of one micro-batch, without communication."""
        return self.forward_us + self.backward_us

    @property
    def overhead(self) -> float | None:
        """Extra time of a micro-batch and the optimizer's step by the plan, a fraction."""
        if self.memory is None:
            return None
        return 0.0 if self.plan is None else self.plan.overhead

    @property
    def gap(self) -> float | None:
        """How far the plan is above its lower bound; 0 where none is needed."""
        if self.memory is None:
            return None
        return 0.0 if self.plan is None else self.plan.gap


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshEstimate(Generic[PlanT]):
    """A training step on many devices; ``str()`` says what each rank holds and sends.

    Parameters
    ----------
    model
        Class of the model.
    mesh
        The axes.
    device
        In words.
    data_parallel
        What is around each rank's modules: ``"ddp"`` or ``"fsdp2"``.
    num_microbatches, schedule
        How many a step has, and in which order they go through the stages.
    budget_bytes, headroom_bytes
        Of each rank; ``None`` where no budget is known.
    links
        Where the bandwidths come from; empty where there are none.
    stages
        In the order of the layers.
    step_us
        Time of a step with its communication and its bubble, simulated; ``None`` where a
        bandwidth is not known, or a stage does not fit.
    bubble
        The part of the pipeline's run in which its busiest stage waits for the others.
    """

    model: str
    mesh: Mesh
    device: str
    data_parallel: str
    num_microbatches: int
    schedule: PipelineSchedule
    budget_bytes: int | None
    headroom_bytes: int
    links: str
    stages: tuple[StageEstimate[PlanT], ...]
    step_us: float | None
    bubble: float | None

    @property
    def fits(self) -> bool:
        """Whether each stage fits, with or without a plan."""
        return all(stage.memory is not None for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, ready for JSON."""
        return {
            "model": self.model,
            "mesh": asdict(self.mesh),
            "device": self.device,
            "data_parallel": self.data_parallel,
            "num_microbatches": self.num_microbatches,
            "schedule": self.schedule,
            "budget_bytes": self.budget_bytes,
            "headroom_bytes": self.headroom_bytes,
            "links": self.links,
            "bubble": self.bubble,
            "step_us": self.step_us,
            "stages": [_figures(stage) for stage in self.stages],
        }

    def __str__(self) -> str:
        return report(self)


def _figures(stage: StageEstimate[Any]) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": stage.layers,
        "in_flight": stage.in_flight,
        "unplanned": asdict(stage.unplanned),
        "memory": None if stage.memory is None else asdict(stage.memory),
        "overhead": stage.overhead,
        "gap": stage.gap,
        "least_budget_bytes": stage.least_budget_bytes,
        "forward_us": stage.forward_us,
        "backward_us": stage.backward_us,
        "optimizer_us": stage.optimizer_us,
        "traffic": [asdict(each) for each in stage.traffic],
    }


def report(found: MeshEstimate[Any]) -> str:
    """A paragraph for each stage, and one for the step."""
    micro = f"{found.num_microbatches} micro-batch{'es' * (found.num_microbatches > 1)}"
    order = f" by {found.schedule}" if found.mesh.pp > 1 else ""
    budget = ""
    if found.budget_bytes is not None:
        budget = f", {format_bytes(found.budget_bytes)} each"
        if found.headroom_bytes:
            budget += f" less {format_bytes(found.headroom_bytes)} headroom"
    lines = [
        f"{found.model} on {found.mesh.num_ranks} × {found.device}{budget}: {found.mesh}, "
        f"{micro}{order}"
    ]
    for stage in found.stages:
        lines += _stage_lines(stage, found)
    if found.step_us is not None:
        bubble = f", {found.bubble:.1%} of it the bubble" if found.mesh.pp > 1 else ""
        lines.append(f"  step       {format_us(found.step_us)} with communication{bubble}")
    elif not found.links:
        lines.append("  step       no bandwidth is known: give bandwidth_gb_per_s=")
    if found.links:
        lines.append(f"  bandwidth  {found.links}")
    lines.append("  not counted: what communication libraries hold, and the latency of messages")
    return "\n".join(lines)


def _stage_lines(stage: StageEstimate[Any], found: MeshEstimate[Any]) -> list[str]:
    which = ""
    if stage.layers is not None:
        which = f", layers {stage.layers[0]} to {stage.layers[1] - 1}"
        which += f", {stage.in_flight} in flight"
    without = format_bytes(stage.unplanned.total_bytes)
    if stage.memory is None:
        least = stage.least_budget_bytes
        known = "" if least is None else f"; the least known to work is {format_bytes(least)}"
        said = f"{without} without a plan, and no plan is known to fit{known}"
    elif stage.plan is None:
        said = f"{without} without a plan{', which fits' * (found.budget_bytes is not None)}"
    else:
        said = (
            f"{format_bytes(stage.memory.total_bytes)} by a plan, {without} without one: "
            f"+{stage.plan.overhead:.2%}, gap {stage.plan.gap:.2%}"
        )
    lines = [f"  stage {stage.stage}{which}: {said}"]
    memory = stage.memory or stage.unplanned
    parts = sorted(memory.by_category.items(), key=lambda part: -part[1])
    lines += [
        f"      {name.replace('_', ' '):<18}{format_bytes(size)}" for name, size in parts if size
    ]
    lines.append(f"      {'micro-batch':<18}{format_us(stage.microbatch_us)}")
    lines += [f"      {_traffic_line(each)}" for each in stage.traffic]
    return lines


def _traffic_line(each: Traffic) -> str:
    line = f"{each.axis}: {each.what}, {each.count}, {format_bytes(each.sent_bytes)} sent"
    if each.time_us is None or each.exposed_us is None:
        return line
    return f"{line}, {format_us(each.time_us)}, of it exposed {format_us(each.exposed_us)}"
