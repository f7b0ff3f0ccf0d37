"""What a validation runs on, and what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graph_capture.loop.data_parallel import bucket_bytes
from graph_capture.loop.loop_holds import LoopHolds

from ..base.training_step import LossFn, Sample, make_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a step runs on."""

    model: nn.Module
    sample_input: Sample
    loss_fn: LossFn | None
    seed: int
    device: torch.device
    holds: LoopHolds

    def bucket_bytes(self) -> int:
        """Bytes of the buckets that a ``DistributedDataParallel`` would have."""
        around = self.holds.distributed
        if around is None:
            return 0
        return bucket_bytes(around, self.model.parameters(), self.device.type)

    def step(self, optimizer: torch.optim.Optimizer | None) -> Callable[[], Any]:
        """Return a function that runs a step."""
        return make_step(
            self.model,
            self.sample_input,
            loss_fn=self.loss_fn,
            optimizer=optimizer,
            seed=self.seed,
            holds=self.holds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Memory and results of one recorded step, beside what of the caller's own was there."""

    resident_bytes: dict[str, int]
    extra_bytes: int
    reserved_bytes: int | None
    gradient_bytes: int
    output_bytes: int
    earlier_gradient_bytes: int

    @property
    def rest_bytes(self) -> int:
        """What is neither resident nor the caller's."""
        return self.extra_bytes + self.earlier_gradient_bytes

    @property
    def peak_bytes(self) -> int:
        """The peak of the step."""
        return sum(self.resident_bytes.values()) + self.rest_bytes


__all__ = ["Taken", "Trial"]
