"""Whether a schedule reads a parameter after its gradient has left.

Gradients that are accumulated or consumed leave a planned backward pass in groups, so that
one group of new gradients is in memory instead of a whole set. A gradient waits for the last
operator that reads its parameter. In the base order the groups take care of that; a schedule
that recomputes such an operator later, which nothing needs, or that has another order, would
hold a gradient longer than its replay says.
"""

from __future__ import annotations

from graph_capture.captured_step import CapturedStep
from graph_capture.leaving import HANDED_ON
from graph_capture.recorder import storage_id
from solvers.schedule import Schedule


def late_read(captured: CapturedStep, schedule: Schedule) -> str | None:
    """Return the first run that reads a parameter too late, in words; ``None`` for none.

    Only where gradients leave while the step runs does it matter.
    """
    if not captured.holds.hands_on:
        return None
    graph, order = captured.graph, schedule.order
    last_read: dict[int, int] = {}
    for i, v in enumerate(order):
        last_read.update((k, i) for k in graph.operators[v].inputs)
    owners = _owners(captured)
    for i, v in enumerate(order):
        if graph.operators[v].target not in HANDED_ON:
            continue
        for k in graph.operators[v].inputs:
            owner = owners.get(k)
            if owner is not None and last_read.get(owner, -1) > i:
                late = graph.operators[order[last_read[owner]]]
                return f"{late.name!r} reads {graph.storages[owner].name!r}"
    return None


def _owners(captured: CapturedStep) -> dict[int, int]:
    """The storage that each gradient's storage is for."""
    storage_of = captured.storage_of_memory
    return {
        storage_of[storage_id(gradient.meta["val"])]: storage_of[storage_id(leaf.meta["val"])]
        for leaf, gradient in captured.step.gradients
        if storage_id(gradient.meta["val"]) in storage_of
        and storage_id(leaf.meta["val"]) in storage_of
    }
