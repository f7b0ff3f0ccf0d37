"""A plan: the decision, what it predicts, and how near the best it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from graph_capture.cost_graph import CostGraph
from graph_capture.costs.cost_model import CostRecord
from graph_capture.costs.library_workspace import STORAGE_NAME
from graph_capture.loss import LossFn, LossSpec
from graph_capture.optimizer_step import OptimizerStep
from graph_capture.outcomes import Outcome
from graph_capture.units import format_bytes, format_us
from solvers.replay import Replay, replay
from solvers.result import SolveStatus
from solvers.schedule import Schedule

if TYPE_CHECKING:
    from graph_capture.captured_step import CapturedStep

    from .base.call_guard import CallGuard
    from .base.module_structure import Structure
    from .base.progress import ShowLines
    from .base.training_step import Sample
    from .measuring.validation import Validation
    from .planning.make_plan import Request
    from .sizing.max_batch import MaxBatch
    from .sizing.samples import MakeSample

LIBRARY_WORKSPACE = "library_workspace"

OnShapeChange = Literal["error", "unplanned", "replan"]


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
        kernel's scratch), library_workspace (what cuBLAS holds all the while).
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
        """What is there at the peak of a replayed schedule."""
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
class Plan:
    """A schedule for one training step of one model under a byte budget.

    Made by :func:`planner.optimize`; read from a file by :meth:`load`.

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
        What is differentiated, and what that takes.
    never_recompute, always_recompute
        As they were asked for.
    reorder
        Whether first runs were free to leave eager's order.
    detached
        Names of the outputs that come back detached.
    device_type, torch_version
        Where it runs and with what it was planned.
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
        What forward was answered, in order, when it asked for values of tensors; each
        step checks that it still is so. ``None`` in a plan from a file that is older.
    """

    graph: CostGraph
    schedule: Schedule
    guard: CallGuard
    budget_bytes: int
    baseline_peak_bytes: int
    baseline_step_us: float
    lower_bound_us: float
    bound_scope: str
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
    branch_free: bool = False
    outcomes: tuple[Outcome, ...] | None = ()
    _captured: CapturedStep | None = field(default=None, repr=False, compare=False)
    _structure: Structure | None = field(default=None, repr=False, compare=False)
    _request: Request | None = field(default=None, repr=False, compare=False)
    _replay: Replay = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_replay", replay(self.graph, self.schedule))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None, "_structure": None, "_request": None}

    # -- figures ---------------------------------------------------------------

    @property
    def predicted_peak_bytes(self) -> int:
        """Peak of the planned step, by replay."""
        return self._replay.peak_bytes

    @property
    def predicted_step_us(self) -> float:
        """Time of the planned step under the cost model."""
        return self._replay.cost_ns / 1e3

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
        """What the predicted peak consists of, and where it is."""
        return PeakMemory.of(self.graph, self.schedule, self._replay)

    # -- use -------------------------------------------------------------------

    def apply(self, model: nn.Module, *, on_shape_change: OnShapeChange = "error") -> nn.Module:
        """Let ``model`` train by this plan; returns the same object.

        The module keeps its class, parameters, buffers, hooks and
        ``state_dict``. In ``eval()`` mode and under ``no_grad`` it runs its own
        forward. A plan that is applied to it already is replaced by this one, and
        one :meth:`remove` gives the own forward back.

        Parameters
        ----------
        on_shape_change
            What a training call does that differs from the planned one (in
            shapes, dtypes, plain arguments, the modules' training flags, …):
            ``"error"`` names the difference, ``"unplanned"`` runs the model's
            own forward, ``"replan"`` makes another plan with the same budget
            and keeps it beside this one.

        Raises
        ------
        PlanMismatchError
            When the plan was made for another model, input, version or device.
        PlanError
            When it is known by now that other steps take another way through the
            model, and ``on_shape_change`` is ``"error"``.
        """
        from .running.attach import apply_plan

        return apply_plan(self, model, on_shape_change)

    @staticmethod
    def remove(model: nn.Module) -> nn.Module:
        """Give ``model`` its own forward back; returns the same object.

        Raises
        ------
        PlanError
            When no plan is applied to it.
        """
        from .running.attach import remove_plan

        return remove_plan(model)

    def max_batch(
        self,
        model: nn.Module,
        sample_input: Any,
        *,
        loss_fn: LossFn | None = None,
        batch_dim: int = 0,
        make_sample: MakeSample | None = None,
        largest: int = 2**16,
        time_limit_s: float | None = None,
        progress: ShowLines = None,
    ) -> MaxBatch:
        """The largest batch that fits this plan's budget, without a plan and with one.

        Everything else is as this plan was asked for: loss, optimizer, autocast,
        rules, device, headroom. See :func:`planner.max_batch` for the arguments
        and the errors.

        Parameters
        ----------
        loss_fn
            In the place of the plan's own, which must take outputs of every
            batch size; needed for a plan from a file that was made with one.

        Raises
        ------
        PlanError
            When a plan from a file needs its ``loss_fn``.
        """
        from .sizing.max_batch import max_batch_of

        return max_batch_of(
            self,
            model,
            sample_input,
            loss_fn=loss_fn,
            batch_dim=batch_dim,
            make_sample=make_sample,
            largest=largest,
            time_limit_s=time_limit_s,
            progress=progress,
        )

    def validate(
        self,
        model: nn.Module,
        sample_input: Sample,
        *,
        loss_fn: LossFn | None = None,
        optimizer: torch.optim.Optimizer | str | None = None,
        repeats: int = 10,
        unplanned: bool = True,
        bits: bool = True,
        seed: int = 0,
    ) -> Validation:
        """Run real training steps by this plan and put them beside its predictions.

        The plan need not be applied. Model, gradients, buffers, optimizer state,
        random generators and an applied plan are afterwards as they were.

        Parameters
        ----------
        model, sample_input
            As for :func:`planner.optimize`, on the device; under the autocast
            that was planned under.
        loss_fn
            The plan's own where it is known; needed for a plan from a file that
            was made with one.
        optimizer
            The one that the plan counts; ``None`` for a new one of the same kind,
            where that has a name.
        repeats
            How many pairs of an unplanned and a planned step are timed, rounded up to an
            even number.
        unplanned
            Whether the step without the plan runs, too: its peak, the overhead
            and the bits need it. Where it runs out of memory this is reported.
        bits
            Whether outputs, loss, gradients, buffers and random state are compared.
        seed
            Given to ``torch.manual_seed`` before each step.

        Returns
        -------
        Validation
            Prints as a table.

        Raises
        ------
        CallMismatchError, PlanMismatchError
            When the call or the model is not the planned one.
        PlanError
            When a loss or an optimizer is needed that is not known.
        """
        from .measuring.validate import validate_plan

        return validate_plan(
            self,
            model,
            sample_input,
            loss_fn=loss_fn,
            optimizer=optimizer,
            repeats=repeats,
            unplanned=unplanned,
            bits=bits,
            seed=seed,
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        from .saving.serialize import save_plan

        save_plan(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises
        ------
        PlanError
            When the file is no such plan, or is damaged.
        """
        from .saving.serialize import load_plan

        return load_plan(Path(path))

    def __str__(self) -> str:
        from .report import report

        return report(self)

    def __repr__(self) -> str:
        return (
            f"<Plan {self.status} for {format_bytes(self.budget_bytes)}: "
            f"peak {format_bytes(self.predicted_peak_bytes)}, "
            f"step {format_us(self.predicted_step_us)} (+{self.overhead:.2%}), gap {self.gap:.2%}>"
        )
