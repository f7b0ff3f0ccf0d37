"""A plan whose parts are inside the model's own blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.loop.loss import LossFn
from graph_capture.units import format_bytes

from .base.call_guard import CallGuard
from .base.forward_slot import forwards_set
from .base.live_state import LiveState
from .base.training_step import Sample
from .blocks.applying import apply_blocks, planned_forwards, remove_blocks
from .blocks.block_files import load_block_plan, save_block_plan
from .blocks.block_record import BlockParts
from .blocks.block_report import block_lines
from .errors import PlanError
from .measuring.loss_and_optimizer import planned_loss_fn
from .measuring.validate import check_trial, validate_step
from .measuring.validation import Validation
from .plan import Plan
from .plan_record import OnShapeChange, PlanRecord
from .running.another_call import mismatch
from .running.compiled_calls import PlanCompiler


@dataclass(frozen=True, kw_only=True)
class BlockPlan(Plan):
    """Plans for the blocks of one model, chosen together under a budget for the whole step.

    Made by :func:`planner.optimize` with ``granularity="blocks"``, or read from a file by
    :meth:`load`. Each block's forward is replaced by a planned step of its own, and all else
    of the model stays as it is: hooks on blocks, ``fully_shard``, pipeline stages. The
    attributes are those of :class:`planner.plan_record.PlanRecord`, of the whole step.

    Attributes
    ----------
    parts
        Which block runs by which plan.
    """

    parts: BlockParts
    _parts_live: tuple[LiveState | None, ...] = field(default=(), repr=False, compare=False)
    _loss_fn: LossFn | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of_blocks(
        cls,
        record: PlanRecord,
        parts: BlockParts,
        live: Sequence[LiveState | None] = (),
        loss_fn: LossFn | None = None,
    ) -> BlockPlan:
        """Make a plan of a step's record and its blocks' plans."""
        decided = {f.name: getattr(record, f.name) for f in fields(PlanRecord)}
        states = tuple(live) or (None,) * len(parts.plans)
        return cls(**decided, parts=parts, _parts_live=states, _loss_fn=loss_fn)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the planned blocks, in the order of the forward pass."""
        return tuple(self.parts.plan_of)

    def __getstate__(self) -> dict[str, Any]:
        states = (None,) * len(self.parts.plans)
        return {**self.__dict__, "_live": None, "_parts_live": states, "_loss_fn": None}

    def apply(  # type: ignore[override]  # a block cannot plan another shape by itself
        self,
        model: nn.Module,
        *,
        on_shape_change: OnShapeChange = "error",
        compile: bool = False,
    ) -> nn.Module:
        """Make the blocks of ``model`` train by this plan; returns the same object.

        Call it before or after ``fully_shard`` of each block, on the module whose blocks have
        these paths. Nothing is applied when one of the blocks is not the planned one; a block
        that is sharded already is captured and compared at its first call. Where blocks are
        sharded, or will be among all processes of the job as the plan counts, every process has
        to apply it: their plans are compared first (:func:`planner.check_same_plan`).

        Parameters
        ----------
        on_shape_change
            What a block does when it is called otherwise than planned: ``"error"`` names
            the difference, ``"unplanned"`` runs the block's own forward.
        compile
            Compile stretches of the blocks' steps, as :meth:`planner.Plan.apply` does, where
            the step's budget has room.

        Raises
        ------
        PlanMismatchError
            When a block is missing or is another than planned, and names it; or when another
            process has another plan.
        PlanError
            When the model has a plan of the whole step, or another process does not come.
        """
        compilers = self._compiler_of if compile else None
        return apply_blocks(model, self, self.parts, self._parts_live, on_shape_change, compilers)

    def _compiler_of(self) -> Callable[[str], PlanCompiler]:
        """Return what compiles the plan of a block; imported late, since it loads Inductor."""
        from .compiled.planned_code import PlannedCompiler, Room, check_device

        check_device(self)
        step = PlanRecord(**{f.name: getattr(self, f.name) for f in fields(PlanRecord)})
        return lambda path: PlannedCompiler(Room.of_block(step, self.parts.of(path), path))

    @staticmethod
    def remove(model: nn.Module) -> nn.Module:
        """Restore the own forward of the blocks of ``model``; returns the same object.

        Raises
        ------
        PlanError
            When none has a plan.
        """
        return remove_blocks(model)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, blocks named by their paths, whole or not at all."""
        save_block_plan(self, self.parts, Path(path))

    @staticmethod
    def load(path: str | Path) -> BlockPlan:
        """Read a plan that :meth:`save` wrote.

        Raises
        ------
        PlanError
            When the file is not such a plan, or is damaged.
        """
        return BlockPlan.of_blocks(*load_block_plan(Path(path)))

    def for_call(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse: another call has blocks of its own, to be planned by ``optimize``."""
        raise PlanError("plan another call in blocks with optimize(…, granularity='blocks')")

    def max_batch(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse: the largest batch is searched for plans of the whole step."""
        raise PlanError("max_batch plans the whole step: use planner.max_batch(model, …)")

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

        As :meth:`planner.Plan.validate` does, on a model whose blocks are not sharded; with
        ``compile=True`` stretches of the blocks' steps are compiled.
        """
        if self.holds.sharded is not None:
            raise PlanError(
                f"the plan is for one rank of {self.holds.sharded}: apply it on all of them, and "
                "measure the sharded model with planner.measure(model, …)"
            )
        check_trial(model, sample_input, repeats)
        compiler_of = self._compiler_of() if compile else None
        planned, own = planned_forwards(model, self.parts, self._parts_live, compiler_of)
        with forwards_set(own):
            arguments = bind_call(model.forward, *split_sample(sample_input))
            found = CallGuard.of(model, arguments, self.device_type)
        different = self.guard.difference_to(found)
        if different is not None:
            raise mismatch(different, inside=True)
        return validate_step(
            self,
            model,
            sample_input,
            planned=planned,
            own=own,
            loss_fn=planned_loss_fn(self, loss_fn, self._loss_fn),
            optimizer=optimizer,
            repeats=repeats,
            unplanned=unplanned,
            bits=bits,
            seed=seed,
        )

    def export(self, to: str) -> NoReturn:
        """Refuse: settings of other tools are chosen from a plan of the whole step."""
        raise PlanError(f"to export to {to!r}, plan the whole step: granularity='step'")

    def __str__(self) -> str:
        return f"{super().__str__()}\n{block_lines(self, self.parts)}"

    def __repr__(self) -> str:
        return (
            f"<BlockPlan {self.status} of {len(self.parts.plan_of)} blocks for "
            f"{format_bytes(self.budget_bytes)}: peak {format_bytes(self.predicted_peak_bytes)}, "
            f"+{self.overhead:.2%}, gap {self.gap:.2%}>"
        )
