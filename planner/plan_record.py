"""The decision for a step, and its figures; independent of models, files and runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from graph_capture.cost_graph import CostGraph
from graph_capture.costs.cost_model import CostRecord
from graph_capture.costs.library_workspace import STORAGE_NAME
from graph_capture.loop.loop_holds import NOTHING_ELSE, LoopHolds
from graph_capture.loop.loss import LossSpec
from graph_capture.loop.optimizer_step import OptimizerStep
from graph_capture.values.outcomes import Outcome
from solvers.replay import Replay, replay
from solvers.result import SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope

from .base.call_guard import CallGuard
from .base.shape_range import ShapeRange

LIBRARY_WORKSPACE = "library_workspace"

OnShapeChange = Literal["error", "unplanned", "replan", "adapt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Memory at the predicted peak.

    Parameters
    ----------
    total_bytes
        The peak.
    by_category
        Bytes of it by what they hold: parameter, buffer, gradient,
        optimizer_state, input, output, activation, temporary, workspace (a
        kernel's scratch), library_workspace (what cuBLAS holds all the while),
        resident (the caller's other tensors, see ``resident_bytes``), bucket (of
        ``DistributedDataParallel``, see ``distributed``), gathered (by ``fully_shard``: whole
        parameters, buffers of collectives).
    operator
        Name of the operator that runs at the peak.
    phase, module_path, source
        Where it belongs.
    """

    total_bytes: int
    by_category: Mapping[str, int]
    operator: str
    phase: str
    module_path: str
    source: str

    @classmethod
    def of(cls, graph: CostGraph, schedule: Schedule, outcome: Replay) -> PeakMemory:
        """Return what is in memory at the peak of a replayed schedule."""
        step = outcome.peak_step
        operator = graph.operators[schedule.order[step]]
        parts: dict[str, int] = {}
        for storage in graph.storages:
            if storage.producer is None:
                category: str = storage.category
                if storage.name == STORAGE_NAME:  # the graph has it among the buffers
                    category = LIBRARY_WORKSPACE
                parts[category] = parts.get(category, 0) + storage.size_bytes
        for k in outcome.live_at(step):
            storage = graph.storages[k]
            parts[storage.category] = parts.get(storage.category, 0) + storage.size_bytes
        if operator.workspace_bytes:
            parts["workspace"] = operator.workspace_bytes
        return cls(
            total_bytes=outcome.peak_bytes,
            by_category=dict(sorted(parts.items(), key=lambda item: -item[1])),
            operator=operator.name,
            phase=operator.phase,
            module_path=operator.module_path,
            source=operator.source,
        )


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The decision for one training step of one model, and its predicted figures.

    It does not depend on models, files or runs; :class:`planner.Plan` adds these.

    Parameters
    ----------
    graph
        The cost graph that was solved.
    schedule
        The order in which its operators run.
    guard
        The call and the state of the model that the plan is for.
    budget_bytes
        The budget: the device's peak during a whole step.
    budget_share
        The share of ``baseline_peak_bytes`` that was asked for, where the budget was
        given as one.
    headroom_bytes
        Part of it that the plan leaves alone.
    baseline_peak_bytes, baseline_step_us
        Predicted peak and time when nothing is recomputed.
    lower_bound_us
        No schedule within ``bound_scope`` takes less time.
    status, solver, solve_s, log
        As the solver reported.
    optimizer
        The optimizer whose state and step are in the budget, or ``None``.
    loss
        What is differentiated, and its costs.
    never_recompute, always_recompute
        As they were requested.
    reorder
        Whether first runs were free to leave eager's order.
    detached
        Names of the outputs that come back detached.
    device_type, torch_version
        Where it runs, and the version it was planned with.
    costs
        Where its times come from.
    device_name
        The name in the table of devices that was asked for; ``None`` for where the
        model lay, and for a device that is not in the table.
    branch_free
        Whether a value that is not known while planning decides a branch of the
        model, so that the plan follows the path that libraries keep for
        ``torch.compile`` (``torch.compiler.is_compiling()``).
    outcomes
        The answers, in order, when forward asked for values of tensors; each step
        checks that they still hold. ``None`` in a plan from an older file.
    shapes
        Smaller shapes of the call that the plan is for, too.
    holds
        What the loop around the step holds: its outputs, older gradients, other tensors.
    """

    graph: CostGraph
    schedule: Schedule
    guard: CallGuard
    budget_bytes: int
    baseline_peak_bytes: int
    baseline_step_us: float
    lower_bound_us: float
    bound_scope: BoundScope
    status: SolveStatus
    solver: str
    solve_s: float
    seed: int
    log: tuple[str, ...]
    optimizer: OptimizerStep | None
    loss: LossSpec
    never_recompute: tuple[str, ...] = ()
    always_recompute: tuple[str, ...] = ()
    reorder: bool = False
    detached: tuple[str, ...] = ()
    device_type: str
    torch_version: str
    costs: CostRecord
    device_name: str | None = None
    headroom_bytes: int = 0
    budget_share: float | None = None
    branch_free: bool = False
    outcomes: tuple[Outcome, ...] | None = ()
    shapes: ShapeRange = field(default_factory=ShapeRange)
    holds: LoopHolds = NOTHING_ELSE

    @cached_property
    def replay(self) -> Replay:
        """The schedule's memory and time, moment by moment."""
        return replay(self.graph, self.schedule)

    # -- figures ---------------------------------------------------------------

    @property
    def predicted_peak_bytes(self) -> int:
        """Peak of the planned step, by replay."""
        return self.replay.peak_bytes

    @property
    def predicted_step_us(self) -> float:
        """Time of the planned step under the cost model."""
        return self.replay.cost_ns / 1e3

    @property
    def overhead(self) -> float:
        """Extra time over the step that recomputes nothing, as a fraction of it."""
        return self.predicted_step_us / self.baseline_step_us - 1 if self.baseline_step_us else 0.0

    @property
    def gap(self) -> float:
        """``(predicted step - lower bound) / lower bound``."""
        if not self.lower_bound_us:
            return 0.0
        return max(0.0, self.predicted_step_us / self.lower_bound_us - 1)

    @property
    def fingerprint(self) -> str:
        """Identifies the step that the plan is for; equal for equal models and inputs."""
        return self.graph.fingerprint

    @property
    def memory(self) -> PeakMemory:
        """What the predicted peak consists of, and where it occurs."""
        return PeakMemory.of(self.graph, self.schedule, self.replay)
