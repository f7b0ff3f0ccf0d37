"""Put plans inside a model's blocks, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from graph_capture.calls.spread_out import is_sharded
from graph_capture.private_torch.sharding import gathered_group_of

from ..base.data_parallel import inside
from ..base.forward_slot import Forward, Forwards, forward_set, own_forward, stand_in_of
from ..base.live_state import LiveState
from ..errors import PlanError, PlanMismatchError
from ..plan_record import OnShapeChange, PlanRecord
from ..running.attach import (
    AppliedPlan,
    applied_plan,
    apply_plan,
    apply_unseen,
    captured_plan,
    place_in_model,
    remove_plan,
)
from ..running.compiled_calls import CompiledCalls, PlanCompiler
from ..running.planned_forward import PlannedForward
from ..running.same_plan import on_all_ranks, ranks_dividing
from .block_record import BlockParts
from .looking_at_loop import LookAtLoop

POLICIES: tuple[OnShapeChange, ...] = ("error", "unplanned")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedBlocks:
    """How the blocks of a model have trained under their plans so far.

    Parameters
    ----------
    blocks
        By path, as :func:`planner.applied_plan` says it of one module.
    """

    blocks: dict[str, AppliedPlan]

    @property
    def planned_steps(self) -> int:
        """Training calls that every block has run by its plan."""
        return min((applied.planned_steps for applied in self.blocks.values()), default=0)

    @property
    def unplanned_steps(self) -> int:
        """The most training calls that a block has run by its own forward."""
        return max((applied.unplanned_steps for applied in self.blocks.values()), default=0)

    @property
    def last_mismatch(self) -> str | None:
        """Why the last of those differed from the planned one, of the first such block."""
        reasons = (applied.last_mismatch for applied in self.blocks.values())
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def compiled(self) -> CompiledCalls | None:
        """What is compiled of all blocks; ``None`` before a step, or if nothing is to be."""
        found = [applied.compiled for applied in self.blocks.values() if applied.compiled]
        return sum(found, CompiledCalls()) if found else None

    def __str__(self) -> str:
        num_steps = self.planned_steps + self.unplanned_steps
        text = (
            f"{self.planned_steps} of {num_steps} steps by the plans of {len(self.blocks)} blocks"
        )
        if self.unplanned_steps:
            text += f"; the last that was not: {self.last_mismatch}"
        if self.compiled is not None:
            text += f"; {self.compiled}"
        return text


def apply_blocks(
    model: nn.Module,
    step: PlanRecord,
    parts: BlockParts,
    live: Sequence[LiveState | None],
    on_shape_change: OnShapeChange,
    make_compilers: Callable[[], Callable[[str], PlanCompiler]] | None = None,
) -> nn.Module:
    """Apply the plans, all or none; see :meth:`planner.BlockPlan.apply`.

    Plans of an earlier call are replaced. They are removed, too, once one of these was
    applied and another one cannot be: what is left would be a part of that plan.

    Parameters
    ----------
    make_compilers
        Returns what returns the compiler of the block at a path; ``None`` compiles nothing.
    """
    earlier = [m for _, m in _planned(model)]
    done: list[nn.Module] = []
    ranks = _ranks_with(step, model)
    try:
        with on_all_ranks(step, ranks):
            _refuse_at_once(model, on_shape_change)
            look = LookAtLoop.of(step, model)
            compiler_of = make_compilers() if make_compilers else None
            modules = {path: _at(model, path) for path in parts.plan_of}
            for path, module in modules.items():
                i = parts.plan_of[path]
                compiler = None if compiler_of is None else compiler_of(path)
                try:
                    if is_sharded(module):
                        _check_shapes(parts.plans[i], module)
                        apply_unseen(parts.plans[i], module, on_shape_change, compiler=compiler)
                    else:
                        apply_plan(
                            parts.plans[i], live[i], module, on_shape_change, {}, compiler=compiler
                        )
                except PlanMismatchError as error:
                    raise PlanMismatchError(f"block {path!r}: {error}") from error
                place_in_model(module, path, look)
                done.append(module)
            for module in earlier:
                if module not in done:
                    remove_plan(module)
    except BaseException:
        if done or ranks is not None:  # another process may have replaced the earlier plans
            for _, module in _planned(model):
                remove_plan(module)
        raise
    return model


def _refuse_at_once(model: nn.Module, on_shape_change: OnShapeChange) -> None:
    if on_shape_change not in POLICIES:
        raise ValueError(
            f"on_shape_change is one of {POLICIES} for a plan in blocks, got {on_shape_change!r}: "
            "a block cannot plan another shape by itself, since the budget is the whole step's. "
            "Where shapes change, plan the largest in blocks and take 'unplanned' for the others, "
            "or plan the whole step (granularity='step'), which adapts"
        )
    if stand_in_of(model) is not None:
        raise PlanError(
            f"this {type(model).__name__} has a plan of the whole step: Plan.remove(model) first"
        )


def planned_forwards(
    model: nn.Module,
    parts: BlockParts,
    live: Sequence[LiveState | None],
    compiler_of: Callable[[str], PlanCompiler] | None = None,
) -> tuple[Forwards, Forwards]:
    """Return the forwards with which a model runs by its blocks' plans, and those without.

    Nothing is applied. A plan of the whole step is in neither of them.

    Parameters
    ----------
    compiler_of
        Returns the compiler of the block at a path; ``None`` compiles nothing.

    Raises
    ------
    PlanMismatchError
        Names the first block that is missing or is another than planned.
    PlanError
        When a block is sharded.
    """
    own = [(model, own_forward(model))]
    planned: list[tuple[nn.Module, Forward | None]] = list(own)
    for path, i in parts.plan_of.items():
        module = _at(model, path)
        if is_sharded(module):
            raise PlanError(f"block {path!r} is sharded: try the plan on the whole model")
        own.append((module, own_forward(module)))
        try:
            with forward_set(*own[-1]):
                plan, state, captured = captured_plan(parts.plans[i], live[i], module)
        except PlanMismatchError as error:
            raise PlanMismatchError(f"block {path!r}: {error}") from error
        compiler = None if compiler_of is None else compiler_of(path)
        planned.append((module, PlannedForward(module, plan, state, captured, compiler=compiler)))
    return planned, own


def _ranks_with(step: PlanRecord, model: nn.Module) -> Sequence[int] | None:
    """The processes that train the same model and have to apply the same plan.

    Where nothing is sharded yet, these are all processes, if they are as many as planned.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = next(filter(None, map(gathered_group_of, model.modules())), None)
    if group is not None:
        ranks: list[int] = group.mesh_info.mesh.mesh.flatten().tolist()
        return ranks
    if step.holds.sharded is not None and dist.get_world_size() == step.holds.sharded.ranks:
        return range(dist.get_world_size())
    return ranks_dividing(model)


def _check_shapes(plan: PlanRecord, module: nn.Module) -> None:
    """Compare a sharded block's parameters with those planned, by their whole shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, spec in plan.guard.state.items():
        if name in found and found[name] != spec.shape:
            raise PlanMismatchError(
                f"{name} has shape {found[name]}, planned was {spec.shape}: make a plan for this "
                "model with optimize()"
            )


def remove_blocks(model: nn.Module) -> nn.Module:
    """Remove the plans inside a model; see :meth:`planner.BlockPlan.remove`."""
    planned = [m for _, m in _planned(model)]
    if not planned:
        raise PlanError(f"no block of this {type(model).__name__} has a plan")
    for module in planned:
        remove_plan(module)
    return model


def applied_blocks(model: nn.Module) -> AppliedBlocks | None:
    """Return the plans inside a model and how many steps each has run; ``None`` for none."""
    found = {path: applied for path, m in _planned(model) if (applied := applied_plan(m))}
    return AppliedBlocks(blocks=found) if found else None


def _planned(model: nn.Module) -> list[tuple[str, nn.Module]]:
    named = [(path, m) for path, m in model.named_modules() if path]
    return [(path, m) for path, m in named if applied_plan(m) is not None]


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        hint = "" if inside(model) is model else ": apply it to the module inside, wrapper.module"
        raise PlanMismatchError(
            f"this {type(model).__name__} has no block {path!r}, which the plan is for{hint}"
        ) from error
