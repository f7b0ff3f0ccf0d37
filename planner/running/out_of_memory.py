"""The note that a planned step adds to an out-of-memory error.

PyTorch's error passes on unchanged, with its own type and message, so that
``except torch.OutOfMemoryError`` works as before. It carries a *note*
(``BaseException.add_note``), which Python prints below the message: what the plan
predicted, which operator ran, what was alive by the plan, what the device held, and
what to change. A note, unlike a subclass, keeps the exception's identity: code that
compares types or prints the message sees no change. If nothing fails, this costs
nothing.

Which operator ran is read from the traceback: its line in the generated code
assigns to the name of a torch.fx node, and each node knows its run in the
schedule.

Not covered are failures outside the planned module (the loss, the optimizer's step),
where no code of the plan runs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from torch.fx import GraphModule

from graph_capture.units import format_bytes

from ..base.resident import storage_bytes
from ..plan_record import PlanRecord

HEADER = "Out of memory in a planned step."

# Messages of allocators and libraries that raise a plain RuntimeError.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_ASSIGNED = re.compile(r"\s*(\w+)")
_NUM_LARGEST = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What a CUDA device held when the error occurred.

    Parameters
    ----------
    allocated_bytes, reserved_bytes
        Held by this process's allocator: in tensors, and including its cache.
    free_bytes, total_bytes
        Of the device, for all processes together.
    expandable
        Whether the allocator uses expandable segments.
    """

    allocated_bytes: int
    reserved_bytes: int
    free_bytes: int
    total_bytes: int
    expandable: bool


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's report that memory is exhausted."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error) for m in _MESSAGES)


def explain(error: BaseException, plan: PlanRecord, model: nn.Module, graph: GraphModule) -> None:
    """Add the planner's note to ``error`` if it is about memory and has none yet.

    Parameters
    ----------
    error
        The error caught around a call of ``graph``.
    plan
        The plan that ran.
    model
        The model whose gradients from earlier backward passes are counted.
    graph
        The forward or the backward graph of the plan.
    """
    if not is_out_of_memory(error):
        return
    if any(note.startswith(HEADER) for note in getattr(error, "__notes__", ())):
        return
    try:
        device = _device_of(model, plan.device_type)
        error.add_note(
            account(
                plan,
                moment_of(error.__traceback__, graph),
                memory=_memory_of(device),
                host=_host_memory() if device.type == "cpu" else None,
                held_gradient_bytes=0 if plan.holds.accumulates else _gradient_bytes(model, device),
            )
        )
    except (MemoryError, RuntimeError, LookupError, OSError, ValueError) as failure:
        # An error in the explanation must not replace the user's error.
        error.add_note(f"{HEADER} No more can be said: {type(failure).__name__}: {failure}")


def moment_of(traceback: TracebackType | None, graph: GraphModule) -> int | None:
    """Return the schedule index of the run in progress, if the graph's code ran."""
    code = type(graph).forward.__code__
    while traceback is not None and traceback.tb_frame.f_code is not code:
        traceback = traceback.tb_next
    if traceback is None:
        return None
    lines = graph.code.splitlines()
    assigned = _ASSIGNED.match(lines[traceback.tb_lineno - 1])
    name = assigned[1] if assigned else ""
    return next((n.meta.get("moment") for n in graph.graph.nodes if n.name == name), None)


def account(
    plan: PlanRecord,
    moment: int | None,
    *,
    memory: DeviceMemory | None = None,
    host: Mapping[str, int] | None = None,
    held_gradient_bytes: int = 0,
) -> str:
    """Return the note, some fifteen lines.

    Parameters
    ----------
    moment
        The run, from :func:`moment_of`; ``None`` if it is not known.
    memory
        Memory of the CUDA device.
    host
        Host memory of this process, by kind.
    held_gradient_bytes
        Bytes of gradients that existed before the step.
    """
    lines = [HEADER, *_about_plan(plan)]
    before_bytes: int | None = None
    if moment is None:
        lines.append("  failed    outside the plan's operators")
    else:
        before_bytes = memory_before(plan, moment)
        lines += _about_run(plan, moment, before_bytes)
    if memory is not None:
        lines += _about_device(memory, before_bytes)
    elif host:
        lines.append("  process   " + ", ".join(f"{k} {format_bytes(n)}" for k, n in host.items()))
    if held_gradient_bytes:
        lines.append(
            f"  gradients {format_bytes(held_gradient_bytes)} existed before the step, and the "
            "plan assumes none"
        )
    advice = _advice(plan, before_bytes, memory, held_gradient_bytes)
    lines += [f"  {'to do' if i == 0 else '':<10}{line}" for i, line in enumerate(advice)]
    return "\n".join(lines)


def _about_plan(plan: PlanRecord) -> list[str]:
    at = plan.memory
    headroom = f", {format_bytes(plan.headroom_bytes)} of it headroom" * bool(plan.headroom_bytes)
    return [
        f"  plan      budget {format_bytes(plan.budget_bytes)}{headroom}; peak "
        f"{format_bytes(plan.predicted_peak_bytes)} predicted, at {at.operator} ({at.phase})"
    ]


def _about_run(plan: PlanRecord, moment: int, before_bytes: int) -> list[str]:
    order, graph = plan.schedule.order, plan.graph
    operator = graph.operators[order[moment]]
    where = operator.module_path or operator.source or "the model itself"
    loss = next(v for v, op in enumerate(graph.operators) if op.phase == "loss")
    phase = "forward" if moment < order.index(loss) else "backward"
    again = ", recomputed" if order[moment] in order[:moment] else ""
    lines = [
        f"  failed    {operator.target} ({operator.name} of {where}) in the {phase} pass{again}, "
        f"run {moment + 1} of {len(order)}",
        f"            predicted: {format_bytes(before_bytes)} before it, "
        f"{format_bytes(plan.replay.memory_bytes[moment])} while it runs",
    ]
    live = _live(plan, moment)
    parts: dict[str, int] = {}
    for k in live:
        storage = graph.storages[k]
        parts[storage.category] = parts.get(storage.category, 0) + storage.size_bytes
    listed = sorted(parts.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in listed if n)
    lines.append(f"  live      {text} (by the plan, before it)")
    largest = sorted(live, key=lambda k: -graph.storages[k].size_bytes)[:_NUM_LARGEST]
    for i, k in enumerate(largest):
        storage = graph.storages[k]
        owner = None if storage.producer is None else graph.operators[storage.producer]
        path = f" of {owner.module_path}" if owner is not None and owner.module_path else ""
        lines.append(
            f"  {'largest' if i == 0 else '':<10}{format_bytes(storage.size_bytes):<8} "
            f"{storage.name}{path} ({storage.category.replace('_', ' ')})"
        )
    return lines


def _live(plan: PlanRecord, moment: int) -> list[int]:
    """Return the storages alive before a run: resident ones, and those computed earlier."""
    live = [k for k, s in enumerate(plan.graph.storages) if s.producer is None]
    return live + [k for k, born, last in plan.replay.live if born < moment <= last]


def memory_before(plan: PlanRecord, moment: int) -> int:
    """Return the bytes in memory before a run: without its outputs and its scratch."""
    operator = plan.graph.operators[plan.schedule.order[moment]]
    over = {new for run, _, new in plan.replay.in_place if run == moment}
    outputs = sum(plan.graph.storages[k].size_bytes for k in operator.outputs if k not in over)
    return plan.replay.memory_bytes[moment] - outputs - operator.workspace_bytes


def _about_device(memory: DeviceMemory, before_bytes: int | None) -> list[str]:
    others = memory.total_bytes - memory.free_bytes - memory.reserved_bytes
    parts = [
        f"{format_bytes(memory.reserved_bytes - memory.allocated_bytes)} is reserved and not "
        "allocated (fragmentation, cache)",
        f"{format_bytes(max(0, others))} is of other processes and of CUDA itself",
    ]
    if before_bytes is not None:
        extra = memory.allocated_bytes - before_bytes
        kind = "in other tensors of this process" if extra >= 0 else "less than predicted"
        parts.insert(0, f"{format_bytes(abs(extra))} {kind}")
    return [
        f"  device    {format_bytes(memory.allocated_bytes)} allocated, "
        f"{format_bytes(memory.reserved_bytes)} reserved, {format_bytes(memory.free_bytes)} free "
        f"of {format_bytes(memory.total_bytes)}",
        *(f"            {part}" for part in parts),
    ]


def _advice(
    plan: PlanRecord,
    before_bytes: int | None,
    memory: DeviceMemory | None,
    held_gradient_bytes: int,
) -> list[str]:
    lines = []
    if held_gradient_bytes:
        lines.append(
            "zero_grad(set_to_none=True) before each step; to accumulate over several backward "
            "passes, plan with grads='accumulated', which counts them"
        )
    if memory is not None and before_bytes is not None:
        extra = memory.allocated_bytes - before_bytes - held_gradient_bytes
        if extra > plan.budget_bytes // 100:
            lines.append(f"free the other tensors on the device: {format_bytes(extra)}")
    if memory is not None and not memory.expandable:
        lines.append("set PYTORCH_ALLOC_CONF=expandable_segments:True (or PYTORCH_CUDA_ALLOC_CONF)")
    if before_bytes is not None:
        room_bytes = before_bytes
        if memory is not None:
            room_bytes = memory.free_bytes + min(memory.allocated_bytes, before_bytes)
        budget_bytes = room_bytes + plan.headroom_bytes
        if plan.predicted_peak_bytes > room_bytes and plan.budget_bytes > budget_bytes:
            lines.append(
                f"lower the budget by about {format_bytes(plan.budget_bytes - budget_bytes)}, to "
                f"{format_bytes(budget_bytes)}: the step had {format_bytes(room_bytes)}"
            )
    if memory is not None:
        lines.append("leave more headroom: optimize(..., headroom='10%')")
    if plan.optimizer is None:
        lines.append("if an optimizer keeps state here, plan with optimizer=, which counts it")
    return lines or ["lower the budget"]


def _device_of(model: nn.Module, device_type: str) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors if t.device.type == device_type), torch.device("cpu"))


def _gradient_bytes(model: nn.Module, device: torch.device) -> int:
    """Return current gradients of parameters; a planned step returns its own only at its end."""
    return storage_bytes((p.grad for p in model.parameters() if p.grad is not None), device)


def _memory_of(device: torch.device) -> DeviceMemory | None:
    if device.type != "cuda":
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    settings = [os.environ.get(f"PYTORCH_{kind}ALLOC_CONF", "") for kind in ("", "CUDA_")]
    return DeviceMemory(
        allocated_bytes=torch.cuda.memory_allocated(device),
        reserved_bytes=torch.cuda.memory_reserved(device),
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        expandable=any("expandable_segments:True" in setting for setting in settings),
    )


def _host_memory() -> dict[str, int]:
    """Return this process's host memory, if the system reports it."""
    found: dict[str, int] = {}
    pages = Path("/proc/self/statm")
    if pages.exists():
        size, resident, *_ = map(int, pages.read_text().split())
        page_bytes: int = os.sysconf("SC_PAGESIZE")
        found = {"resident": resident * page_bytes, "addresses": size * page_bytes}
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            found["limit of addresses"] = limit
    return found
