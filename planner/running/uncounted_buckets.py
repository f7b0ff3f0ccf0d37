"""What of a ``DistributedDataParallel`` a plan does not count."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from graph_capture.loop.data_parallel import DataParallel, bucket_bytes, buckets_of
from graph_capture.loop.loop_holds import LoopHolds

from ..plan_record import PlanRecord


def uncounted_bytes(
    wrapper: DistributedDataParallel, holds: LoopHolds, device_type: str, output_bytes: int
) -> int:
    """Return how many bytes a wrapper's buckets and copies take that a plan does not count.

    Buckets are counted by the plan's word for them, by ``resident_bytes`` that are at least
    theirs, and, where gradients become parts of them, as gradients of earlier backward
    passes. Under ``no_sync()`` gradients lie beside the buckets.

    Parameters
    ----------
    wrapper
        Its forward runs.
    holds, device_type
        Of the plan.
    output_bytes
        Bytes of the model's outputs, which the wrapper may copy.
    """
    parameters = buckets_of(wrapper)
    found, planned = DataParallel.of_wrapper(wrapper), holds.distributed

    def buckets(options: DataParallel) -> int:
        return bucket_bytes(options, parameters, device_type)

    become_parts = found.gradient_as_bucket_view and wrapper.require_backward_grad_sync
    gradients_bytes = buckets(DataParallel())
    there_bytes, counted_bytes = buckets(found), holds.resident_bytes
    if planned is not None:
        counted_bytes += buckets(planned)
    if holds.accumulates:
        counted_bytes += gradients_bytes
        if planned is not None or not become_parts:
            there_bytes += gradients_bytes  # else those of earlier passes are parts of buckets
    if holds.in_buckets and not become_parts:
        there_bytes += gradients_bytes
    if found.copies_outputs and not holds.copies_outputs:
        there_bytes += output_bytes
    return max(0, there_bytes - counted_bytes)


def output_bytes(plan: PlanRecord) -> int:
    """Return the bytes of a planned model's outputs."""
    return sum(
        s.size_bytes
        for s in plan.graph.storages
        if s.category == "output"
        and s.producer is not None
        and plan.graph.operators[s.producer].phase == "forward"
    )


__all__ = ["output_bytes", "uncounted_bytes"]
