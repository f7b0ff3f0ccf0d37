"""Check a plan file beyond its schema: whether its parts fit each other.

A file's tensor specifications are checked here before any tensor is made from them: a
rank, size or device that PyTorch cannot take would abort the process or exhaust its
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from graph_capture.calls.call_spec import TensorSpec, parse_dtype, specs_of
from graph_capture.cost_graph import MAX_TOTAL, CostGraph
from graph_capture.folding.leaving import ACCUMULATE, CONSUME

from ..base.budget import RequestedBudget
from ..plan_record import PlanRecord

MAX_RANK = 64
_AUTOCAST = {"cpu": ("bfloat16", "float16"), "cuda": ("bfloat16", "float16", "float32")}


def check_file_plan(plan: PlanRecord) -> None:
    """Refuse a file that no planner can have written.

    Raises
    ------
    ValueError
        Names the first thing that is wrong.
    """
    for place, spec in _specs(plan):
        _check_spec(place, spec, plan)
    _check_argument_bytes(plan)
    autocast = plan.guard.autocast
    if autocast is not None:
        parse_dtype(autocast)
        if autocast not in _AUTOCAST[plan.device_type]:
            raise ValueError(f"at call.autocast: {plan.device_type} has none for {autocast}")
    if plan.budget_share is not None:
        asked = RequestedBudget(num_bytes=None, share=plan.budget_share)
        _agree("budget_bytes", plan.budget_bytes, asked.settled(plan.baseline_peak_bytes).num_bytes)
    try:
        plan.shapes.check(plan.guard.arguments)
    except ValueError as error:
        raise ValueError(f"at shapes: {error}") from error
    _check_loss(plan)
    _check_optimizer(plan)
    _check_loop_holds(plan)


def _specs(plan: PlanRecord) -> Iterator[tuple[str, TensorSpec]]:
    for name, argument in plan.guard.arguments.items():
        for spec in specs_of(argument):
            yield f"call.arguments.{name}", spec
    for name, spec in plan.guard.state.items():
        yield f"call.state.{name}", spec
    for i, spec in enumerate(plan.loss.tangents):
        yield f"loss.tangents[{i}]", spec
    for i, outcome in enumerate(plan.outcomes or ()):
        for spec in outcome.made or ():
            yield f"outcomes[{i}]", spec


def _check_spec(place: str, spec: TensorSpec, plan: PlanRecord) -> None:
    rank = len(spec.shape)
    if rank != len(spec.stride):
        raise ValueError(
            f"at {place}: shape {spec.shape!s:.100} and stride {spec.stride!s:.100} do not fit"
        )
    if rank > MAX_RANK:
        raise ValueError(f"at {place}: a tensor has at most {MAX_RANK} dimensions, not {rank}")
    num_elements = 1
    for n in spec.shape:
        num_elements *= max(n, 1)
    # The largest offset counts for an empty tensor, too: PyTorch computes it in 64 bits.
    reach = sum(max(n - 1, 0) * step for n, step in zip(spec.shape, spec.stride, strict=True))
    if max(num_elements, reach + 1, *spec.stride, 1) * spec.dtype.itemsize > MAX_TOTAL:
        raise ValueError(f"at {place}: no memory holds a tensor of shape {spec.shape!s:.100}")
    if spec.device.startswith(plan.device_type) and spec.extent_bytes > plan.budget_bytes:
        raise ValueError(
            f"at {place}: a tensor of {spec.extent_bytes} bytes is above the budget of "
            f"{plan.budget_bytes}"
        )


def _check_argument_bytes(plan: PlanRecord) -> None:
    held, specs = plan.guard.argument_bytes, specs_of(plan.guard.arguments)
    if held is None:
        return
    _agree("call.argument_bytes", len(held), len(specs))
    for num_bytes, spec in zip(held, specs, strict=True):
        if num_bytes and num_bytes < spec.extent_bytes:
            raise ValueError(
                f"at call.argument_bytes: {num_bytes} hold no tensor of {spec.extent_bytes} bytes"
            )


def _check_loss(plan: PlanRecord) -> None:
    losses = [op for op in plan.graph.operators if op.phase == "loss"]
    if len(losses) != 1:
        raise ValueError(f"at operators: {len(losses)} are the loss, one must be")
    region = plan.loss.region
    _agree("the loss's label", str(region.source), losses[0].target)
    held = _held(plan.graph, "held by loss_fn")
    _agree("the loss's constant_bytes", region.constant_bytes, held)
    for i, place in enumerate(plan.loss.memory):
        spec = plan.loss.tangents[i]
        end = place.offset * spec.dtype.itemsize + spec.extent_bytes
        if end > place.size_bytes or place.size_bytes > plan.budget_bytes:
            raise ValueError(
                f"at loss.memory[{i}]: a tangent that ends at byte {end} is not in a block of "
                f"{place.size_bytes} bytes within the budget"
            )


def _check_optimizer(plan: PlanRecord) -> None:
    steps = [op for op in plan.graph.operators if op.phase == "optimizer"]
    at_end = plan.optimizer is not None and not plan.holds.consumes
    if len(steps) != at_end:
        raise ValueError(f"at operators: {len(steps)} are an optimizer's, which does not fit")
    held = _held(plan.graph, "optimizer state")
    _agree("the optimizer's state_bytes", plan.optimizer.state_bytes if plan.optimizer else 0, held)
    if plan.optimizer is not None and at_end:
        _agree("the optimizer's name", plan.optimizer.name, steps[0].target)


def _check_loop_holds(plan: PlanRecord) -> None:
    graph, holds = plan.graph, plan.holds
    found = sum(s.size_bytes for s in graph.storages if s.category == "resident")
    _agree("loop_holds.resident_bytes", holds.resident_bytes, found)
    waiting = [s.size_bytes for s in graph.storages if s.category == "waiting"]
    if len(waiting) != (holds.concurrent_calls > 1):
        raise ValueError("at loop_holds: concurrent_calls does not fit the storages")
    _agree("loop_holds.waiting_bytes", holds.waiting_bytes, sum(waiting))
    adds = any(op.target == ACCUMULATE for op in graph.operators)
    if adds and not (holds.accumulates or holds.in_buckets):
        raise ValueError("at operators: gradients are added to earlier ones, which nobody holds")
    staying = sum(s.category == "gradient" and s.kept for s in graph.storages)
    if holds.accumulates and not adds and staying > len(specs_of(plan.guard.arguments)):
        raise ValueError("at loop_holds: gradients are accumulated, and no operator adds them")
    if any(op.target == CONSUME for op in graph.operators) and not holds.consumes:
        raise ValueError("at operators: gradients are consumed, which the loop does not do")
    buckets = any(s.category == "bucket" for s in graph.storages)
    if buckets != (holds.distributed is not None):
        raise ValueError("at storages: buckets and loop_holds.distributed do not fit")
    if any(s.category == "gathered" for s in graph.storages) != (holds.sharded is not None):
        raise ValueError("at storages: what is gathered and loop_holds.distributed do not fit")
    for storage in graph.storages:
        made_before_loss = (
            storage.category == "output"
            and storage.producer is not None
            and graph.operators[storage.producer].phase == "forward"
        )
        copied = holds.copies_outputs  # the loop has copies of them
        if made_before_loss and not storage.kept and not (holds.releases or copied):
            raise ValueError(f"output {storage.name!r:.100} is let go of, and outputs are held")


def _held(graph: CostGraph, name: str) -> int:
    return sum(s.size_bytes for s in graph.storages if s.producer is None and s.name == name)


def _agree(what: str, said: Any, found: Any) -> None:
    if said != found:
        raise ValueError(f"{what}: the file says {said!r:.100}, its graph has {found!r:.100}")
