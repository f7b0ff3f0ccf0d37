"""A plan in words, for ``print(plan)``."""

from __future__ import annotations

from collections import Counter

from graph_capture.calls.storage_id import storage_id
from graph_capture.costs.devices import DEVICES, Device
from graph_capture.costs.workspace import SCRATCH_NOT_COUNTED
from graph_capture.loop.loss import LossSource
from graph_capture.printable import printable
from graph_capture.units import format_bytes, format_us

from .base.budget import (
    DEFAULT_HEADROOM,
    beyond_device,
    share_text,
)
from .base.live_state import LiveState
from .plan_record import PlanRecord

# Every supported torch reads both names; the second is the older one.
EXPANDABLE_SEGMENTS = (
    "PYTORCH_ALLOC_CONF=expandable_segments:True (or PYTORCH_CUDA_ALLOC_CONF) in the environment "
    "keeps fragmentation low"
)


def report(plan: PlanRecord, live: LiveState | None = None) -> str:
    """Return some twenty lines: memory, time, proof, and what is recomputed."""
    memory = plan.memory
    at = memory.module_path or memory.source or "the training loop"
    lines = [
        f"Plan for {format_bytes(plan.budget_bytes)}{_share(plan)} on {plan.device_type} "
        f"(torch {plan.torch_version}, fingerprint {plan.fingerprint[:12]})",
        f"  peak      {format_bytes(plan.predicted_peak_bytes)} predicted, "
        f"{format_bytes(plan.baseline_peak_bytes)} when nothing is recomputed",
        f"            at {memory.operator} ({memory.phase}, {at})",
    ]
    lines += [
        f"              {category.replace('_', ' '):<16}{format_bytes(num_bytes):>9}"
        for category, num_bytes in memory.by_category.items()
        if num_bytes
    ]
    lines += [
        *_headroom(plan, live),
        f"  time      {format_us(plan.predicted_step_us)} predicted, "
        f"{format_us(plan.baseline_step_us)} when nothing is recomputed: +{plan.overhead:.2%}",
        f"            {plan.costs.model} for {plan.costs.device}",
        *(f"            {note}" for note in plan.costs.notes),
        f"  proof     {plan.status}, gap {plan.gap:.2%} ({plan.solver}, {plan.solve_s:.1f} s); "
        f"at least {format_us(plan.lower_bound_us)} in",
        f"            {plan.bound_scope.words}",
        *_recomputed(plan),
        f"  counts    {_covers(plan)}",
        *([f"  shapes    up to the planned ones: {plan.shapes}"] if plan.shapes.largest else []),
    ]
    if plan.branch_free:
        lines += [
            "  capture   a branch depends on a value (a mask, say): the plan follows the path",
            "            that the model keeps for compilers; eager's last bits may be others",
        ]
    if plan.detached:
        lines.append(
            f"  outputs   only the loss is differentiated; detached: {', '.join(plan.detached)}"
        )
    lines += _held_outputs(plan, live)
    return "\n".join(map(printable, lines))  # names in it may come from a file


def _share(plan: PlanRecord) -> str:
    if plan.budget_share is None:
        return ""
    return f" ({share_text(plan.budget_share)} of the peak without a plan)"


def _held_outputs(plan: PlanRecord, live: LiveState | None) -> list[str]:
    """Return what undifferentiated outputs hold at the peak; nothing for a plan from a file."""
    if live is None:
        return []
    captured = live.captured
    step, outcome = captured.step, plan.replay
    present = set(outcome.live_at(outcome.peak_step))
    storage_of = {
        storage_id(node.meta["val"]): k
        for k, carriers in enumerate(captured.carriers)
        for node in carriers
        if plan.graph.storages[k].category == "output"
    }
    counted = {storage_of.get(storage_id(step.outputs[i].meta["val"])) for i in step.differentiated}
    held: Counter[str] = Counter()
    for name, node in zip(step.template.names, step.outputs, strict=False):
        k = storage_of.get(storage_id(node.meta["val"]))
        if k is not None and k in present and k not in counted:
            counted.add(k)
            held[name] += plan.graph.storages[k].size_bytes
    if not sum(held.values()):
        return []
    names = ", ".join(f"{name} {format_bytes(size)}" for name, size in held.most_common(4) if size)
    more = f", {len(held) - 4} more" if len(held) > 4 else ""
    return [
        f"  held      {format_bytes(sum(held.values()))} of the peak by outputs that are not "
        f"differentiated: {names}{more};",
        "            return less where nobody reads them (use_cache=False, say), or plan with "
        "outputs='released' if your loop lets go of them",
    ]


def _headroom(plan: PlanRecord, live: LiveState | None) -> list[str]:
    lines = []
    if plan.headroom_bytes:
        share = plan.headroom_bytes / plan.budget_bytes
        lines.append(f"{format_bytes(plan.headroom_bytes)} ({share:.1%}) of the budget left free")
        default = DEFAULT_HEADROOM.get(plan.device_type, 0.0)
        if default and plan.headroom_bytes == int(default * plan.budget_bytes):
            lines[-1] += (
                f": {plan.device_type}'s default, assumed for fragmentation and the prediction's "
                "error, not measured"
            )
    device = _device(plan, live)
    beyond = None if device is None else beyond_device(plan.budget_bytes, device)
    if beyond is not None:
        lines.append(f"note: {beyond}")
    if plan.device_type == "cuda":
        lines.append(EXPANDABLE_SEGMENTS)
    return [f"            {line}" for line in lines]


def _device(plan: PlanRecord, live: LiveState | None) -> Device | None:
    """Return the plan's device: the user's own, or a known one by its title."""
    if live is not None:
        return live.captured.target.device
    return next((d for d in DEVICES.values() if d.title == plan.costs.device), None)


def _recomputed(plan: PlanRecord) -> list[str]:
    repeats = plan.schedule.recomputed()
    if not repeats:
        return ["  recompute nothing"]
    by_target: Counter[str] = Counter()
    cost_ns: Counter[str] = Counter()
    for v, times in repeats.items():
        operator = plan.graph.operators[v]
        target = operator.target.removeprefix("aten.").split(".")[0]
        by_target[target] += times
        cost_ns[target] += times * operator.cost_ns
    total = sum(by_target.values())
    parts = [
        f"{by_target[target]} {target} ({format_us(cost / 1e3)})"
        for target, cost in cost_ns.most_common(6)
    ]
    more = len(by_target) - len(parts)
    return [
        f"  recompute {total} runs of {len(repeats)} operators of {plan.graph.num_operators}:",
        f"            {', '.join(parts)}{f', {more} other kinds' if more else ''}",
    ]


def _covers(plan: PlanRecord) -> str:
    optimizer = f"{plan.optimizer.name} state and step" if plan.optimizer else "no optimizer"
    scratch = "" if SCRATCH_NOT_COUNTED in plan.costs.notes else ", scratch"
    source = plan.loss.region.source
    words = plan.holds.words
    if plan.holds.releases and source is LossSource.OUTPUTS:
        words = ("outputs to the end, since the loop differentiates them", *words[1:])
    return (
        f"parameters, buffers, gradients, inputs, outputs, activations, temporaries{scratch}; "
        f"{'; '.join((optimizer, f'backward of {source}', *words))}"
    )
