"""What one rank sends in a step, by its modules, its plan and its place in the mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graph_capture.cost_graph import CostGraph

from ..plan_record import PlanRecord
from .around import Around, gradient_bytes, tensor_bytes
from .communication import Axis, Traffic, all_reduced, gathered, traffic
from .tensor_parallel import Collectives


def rank_traffic(
    module: nn.Module,
    plan: PlanRecord | None,
    parts: Mapping[str, str],
    collectives: Collectives,
    around: Around,
    sample: Mapping[str, Any],
    handed: torch.Tensor | None,
    unplanned: CostGraph,
    speeds: Mapping[Axis, float],
) -> Iterator[Traffic]:
    """What one rank sends in a step, and what hides it."""
    mesh, number = around.mesh, around.number
    for phase in ("forward", "backward"):
        sums = [each for each in collectives.found if each.phase == phase]
        if sums:
            sent = sum(
                (all_reduced if each.kind == "all_reduce" else gathered)(each.num_bytes, mesh.tp)
                for each in sums
            )
            yield traffic(
                "tp",
                f"sums of the {phase} pass",
                count=number * len(sums),
                sent_bytes=number * sent,
                rate=speeds.get("tp"),
                is_forward=phase == "forward",
            )
    again = _summed_again(plan, parts, collectives)
    if again:
        yield traffic(
            "tp",
            "sums that the plan repeats",
            count=number * len(again),
            sent_bytes=number * sum(all_reduced(size, mesh.tp) for size in again),
            rate=speeds.get("tp"),
        )
    if mesh.dp > 1:
        yield from _of_gradients(module, around, unplanned, speeds)
    received = sample.get("inputs_embeds") if around.stage else None
    for what, tensor in (("hidden states", handed), ("their gradients", received)):
        if isinstance(tensor, torch.Tensor):
            each_bytes = tensor_bytes(tensor)
            hidden = 0.0
            if "pp" in speeds:  # all but the first one go while others are computed
                hidden = (number - 1) * each_bytes / speeds["pp"] * 1e6
            yield traffic(
                "pp",
                what,
                count=number,
                sent_bytes=number * each_bytes,
                rate=speeds.get("pp"),
                hidden_us=hidden,
            )


def _of_gradients(
    module: nn.Module, around: Around, unplanned: CostGraph, speeds: Mapping[Axis, float]
) -> Iterator[Traffic]:
    """What data-parallel ranks send."""
    ranks, rate = around.mesh.dp, speeds.get("dp")
    backward_us = phase_ns(unplanned, "backward") / 1e3
    gradients = gradient_bytes(module)
    if around.data_parallel == "ddp":
        yield traffic(
            "dp",
            "sums of gradients",
            count=1,
            sent_bytes=all_reduced(gradients, ranks),
            rate=rate,
            hidden_us=backward_us,
        )
        return
    whole = sum(tensor_bytes(p) for p in module.parameters())
    for phase in ("forward", "backward"):
        yield traffic(
            "dp",
            f"parameters gathered for the {phase} pass",
            count=around.number,
            sent_bytes=around.number * gathered(whole, ranks),
            rate=rate,
            hidden_us=around.number * phase_ns(unplanned, phase) / 1e3,
        )
    yield traffic(
        "dp",
        "gradients summed and divided",
        count=around.number,
        sent_bytes=around.number * gathered(gradients, ranks),
        rate=rate,
        hidden_us=max(0.0, around.number * backward_us),
    )


def _summed_again(
    plan: PlanRecord | None, parts: Mapping[str, str], collectives: Collectives
) -> list[int]:
    """Bytes of the sums that a plan repeats with the products that they belong to."""
    if plan is None:
        return []
    size_of = {
        f"parameter_{each.path.replace('.', '_')}_weight": each.num_bytes
        for each in collectives.found
        if each.phase == "forward" and parts[each.path] == "rowwise"
    }
    weights = {
        k: size_of[storage.name.rpartition("/")[2]]
        for k, storage in enumerate(plan.graph.storages)
        if storage.name.rpartition("/")[2] in size_of
    }
    again = []
    for v, times in plan.schedule.recomputed().items():
        op = plan.graph.operators[v]
        if op.phase == "forward":
            again += [weights[k] for k in op.inputs if k in weights] * times
    return again


def phase_ns(graph: CostGraph, phase: str) -> int:
    """Return the time of the operators of a phase."""
    return sum(op.cost_ns for op in graph.operators if op.phase == phase)
