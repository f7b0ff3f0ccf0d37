"""The plan that users hold: the decision, and everything they can do with it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.loop.loss import LossFn
from graph_capture.units import format_bytes, format_us

from .base.forward_slot import original_forward
from .base.live_state import LiveState
from .base.progress import ShowLines, ShowProgress
from .base.step_spec import check_model
from .base.training_step import Sample
from .explaining.explain import MORE, TIME_LIMIT_S, explain_plan
from .explaining.explanation import Explanation
from .exporting.export import Export, export_plan
from .measuring.validate import validate_plan
from .measuring.validation import Validation
from .plan_record import OnShapeChange, PlanRecord
from .planning.adapt import adapt
from .planning.make_plan import replan
from .report import report
from .running.attach import apply_plan, remove_plan
from .running.compiled_calls import PlanCompiler
from .running.planned_forward import Replan
from .running.same_plan import applied_everywhere
from .saving.serialize import load_plan, save_plan
from .sizing.max_batch import max_batch_of
from .sizing.max_batch_report import MaxBatch
from .sizing.samples import MakeSample


def replans_with(loss_fn: LossFn | None) -> dict[str, Replan]:
    """Return the makers of plans for other calls, by the policy of :meth:`Plan.apply`."""
    replans: dict[str, Replan] = {"replan": replan, "adapt": adapt}
    if loss_fn is None:
        return replans
    return {name: partial(make, loss_fn=loss_fn) for name, make in replans.items()}


def compiler_for(plan: PlanRecord) -> PlanCompiler:
    """Return what compiles a plan's graphs; imported late, since it loads Inductor.

    Raises
    ------
    PlanError
        When the plan is not for the CPU.
    """
    from .compiled.planned_code import PlannedCompiler, check_device

    check_device(plan)
    return PlannedCompiler()


@dataclass(frozen=True, kw_only=True)
class Plan(PlanRecord):
    """A schedule for one training step of one model under a byte budget.

    Made by :func:`planner.optimize`, or read from a file by :meth:`load`. The decision
    and its predicted figures are the attributes of
    :class:`planner.plan_record.PlanRecord`.
    """

    _live: LiveState | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, record: PlanRecord, live: LiveState | None = None) -> Plan:
        """Make a plan of a record and what this process knows besides it."""
        decided = {f.name: getattr(record, f.name) for f in fields(PlanRecord)}
        return cls(**decided, _live=live)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}

    def apply(
        self,
        model: nn.Module,
        *,
        on_shape_change: OnShapeChange = "error",
        loss_fn: LossFn | None = None,
        compile: bool = False,
    ) -> nn.Module:
        """Make ``model`` train by this plan; returns the same object.

        The module keeps its class, parameters, buffers, hooks and ``state_dict``. In
        ``eval()`` mode and under ``no_grad`` it runs its own forward. This plan
        replaces one that is already applied, and a single :meth:`remove` restores the
        model's own forward.

        Parameters
        ----------
        model
            Of a ``DistributedDataParallel`` the module inside gets the plan, on all
            processes of its group or on none: see :func:`planner.check_same_plan`.
        on_shape_change
            What a training call does that differs from the planned one (in
            shapes, dtypes, plain arguments, the modules' training flags, …):
            ``"error"`` names the difference, ``"unplanned"`` runs the model's
            own forward, ``"replan"`` makes another plan with the same budget
            and keeps it beside this one; ``"adapt"`` does so without solving
            wherever this plan's schedule can be transferred, which takes the
            time of a capture: for loops whose shapes change. Calls within the
            ``shapes=`` that the plan was made for adapt in any case.
        loss_fn
            With which other calls are planned, instead of the plan's own. Needed
            for a plan from a file that was made with one.
        compile
            Compile stretches of the planned step by Inductor, with the first call. The
            schedule, what is saved and the random numbers are those of the plan; arithmetic
            is Inductor's, so bits may differ from eager's. A stretch is compiled only
            where its code stays within the budget. ``applied_plan(model).compiled`` says
            how much was, and why the rest was not. On the CPU only.

        Raises
        ------
        PlanMismatchError
            When the plan was made for another model, input, version or device, or another
            process applies another plan.
        PlanError
            When other steps are known to take another path through the model, and
            ``on_shape_change`` is ``"error"``; when another process cannot apply it; or when a
            plan for another device than the CPU is to be compiled.
        """
        with applied_everywhere(model):
            compiler = compiler_for(self) if compile else None
            apply_plan(
                self, self._live, model, on_shape_change, replans_with(loss_fn), compiler=compiler
            )
        return model

    @staticmethod
    def remove(model: nn.Module) -> nn.Module:
        """Restore the own forward of ``model``; returns the same object.

        Raises
        ------
        PlanError
            When no plan is applied to it.
        """
        return remove_plan(model)

    def for_call(
        self, model: nn.Module, sample_input: Any, *, loss_fn: LossFn | None = None
    ) -> Plan:
        """Plan another call of the same model ahead, with the same budget and rules.

        Without labels, say, without a mask, under another autocast, or with other modules
        in training. :class:`planner.PlanSet` applies and saves several plans together.

        Parameters
        ----------
        model
            As it will be when the call comes; autocast counts as it is now.
        sample_input
            As for :func:`planner.optimize`.
        loss_fn
            Replaces the plan's own.

        Raises
        ------
        InfeasibleBudgetError, CaptureError, TypeError, ValueError
            As :func:`planner.optimize` does.
        PlanError
            When a plan from a file needs its ``loss_fn``.
        """
        check_model(model)
        forward = original_forward(model)
        arguments = bind_call(forward, *split_sample(sample_input))
        return Plan.of(*replan(self, self._live, model, arguments, forward, loss_fn=loss_fn))

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
    ) -> MaxBatch[Plan]:
        """Find the largest batch that fits this plan's budget, with and without a plan.

        Everything else is as it was requested for this plan: loss, optimizer, autocast,
        rules, device, headroom. See :func:`planner.max_batch` for the arguments and the
        errors.

        Parameters
        ----------
        loss_fn
            Replaces the plan's own, which must accept outputs of every batch size.
            Needed for a plan from a file that was made with one.

        Raises
        ------
        PlanError
            When a plan from a file needs its ``loss_fn``.
        """
        return max_batch_of(
            self,
            self._live,
            model,
            sample_input,
            loss_fn=loss_fn,
            batch_dim=batch_dim,
            make_sample=make_sample,
            largest=largest,
            time_limit_s=time_limit_s,
            progress=progress,
            as_plan=Plan.of,
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
        compile: bool = False,
    ) -> Validation:
        """Run real training steps by this plan and compare them with its predictions.

        The plan need not be applied. Model, gradients, buffers, optimizer state, random
        generators and an applied plan are restored afterwards.

        Parameters
        ----------
        model, sample_input
            As for :func:`planner.optimize`, on the device; under the autocast
            that was planned under.
        loss_fn
            By default the plan's own. Needed for a plan from a file that was made with
            one.
        optimizer
            The one that the plan counts; ``None`` for a new one of the same kind,
            where that has a name.
        repeats
            Number of timed pairs of an unplanned and a planned step, rounded up to an
            even number.
        unplanned
            Whether to run the step without the plan, too; its peak, the overhead and
            the bits need it. Running out of memory there is reported.
        bits
            Whether to compare outputs, loss, gradients, buffers and random state.
        seed
            Given to ``torch.manual_seed`` before each step.
        compile
            Run the plan as :meth:`apply` with ``compile=True`` does. The predicted peak is then
            that of the code that Inductor generated and of the eager calls between. Results are
            compared with the unplanned eager step's up to rounding instead of by their bits;
            the random generator's state is compared to the bit. On the CPU only.

        Returns
        -------
        Validation
            Prints as a table.

        Raises
        ------
        CallMismatchError, PlanMismatchError
            When the call or the model differs from the planned one.
        PlanError
            When a loss or an optimizer is needed but unknown, or a plan for another device than
            the CPU is to be compiled.
        """
        compiler = compiler_for(self) if compile else None
        return validate_plan(
            self,
            self._live,
            model,
            sample_input,
            loss_fn=loss_fn,
            optimizer=optimizer,
            repeats=repeats,
            unplanned=unplanned,
            bits=bits,
            seed=seed,
            compiler=compiler,
        )

    def explain(
        self,
        *,
        more: int | str = MORE,
        time_limit_s: float = TIME_LIMIT_S,
        progress: ShowProgress = None,
    ) -> Explanation:
        """Say what fills the peak and why, what is recomputed, and what more memory would buy.

        The first two come from the plan's own graph and schedule, the last from a solve
        with a larger budget. A plan from a file explains itself as well.

        Parameters
        ----------
        more
            How much larger the budget of that solve is than the plan's: bytes, ``"1GB"``,
            or a share of the plan's such as ``"10%"``; 0 for no such solve.
        time_limit_s
            For that solve.
        progress
            As for :func:`planner.optimize`.

        Returns
        -------
        Explanation
            Prints as tables.

        Raises
        ------
        ValueError
            When an argument is invalid.
        """
        return explain_plan(self, more=more, time_limit_s=time_limit_s, progress=progress)

    def export(self, to: str) -> Export:
        """Say which layers another tool should checkpoint to come near this plan.

        Such a tool recomputes whole layers, or the outputs of some calls in them, and so
        loses against the plan; how much is in the answer. A handful of its settings are
        judged on the plan's own graph, and the fastest that fits the budget is taken; the
        one with the lowest peak where none does.

        Parameters
        ----------
        to
            ``"transformers"``, ``"lightning"``, ``"megatron"``, ``"deepspeed"``, or
            ``"selective"`` for ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.

        Returns
        -------
        Export
            Its ``code`` is what to write into one's own.

        Raises
        ------
        PlanError
            When the model is no stack of layers.
        ValueError
            When the tool is not known.
        """
        return export_plan(self, to)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        save_plan(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises
        ------
        PlanError
            When the file is not such a plan, or is damaged.
        """
        return Plan.of(load_plan(Path(path)))

    def __str__(self) -> str:
        return report(self, self._live)

    def __repr__(self) -> str:
        return (
            f"<Plan {self.status} for {format_bytes(self.budget_bytes)}: "
            f"peak {format_bytes(self.predicted_peak_bytes)}, "
            f"step {format_us(self.predicted_step_us)} (+{self.overhead:.2%}), gap {self.gap:.2%}>"
        )
