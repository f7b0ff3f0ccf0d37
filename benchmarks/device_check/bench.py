"""A model on the device, its sample, and the plans that several checks share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graph_capture.costs.devices import Device, device_for
from planner import InfeasibleBudgetError, Plan, optimize
from planner.base.forward_slot import unplanned
from planner.base.training_step import train_step

from .subjects import Subject

UNLIMITED_BYTES = 10**15
"""A budget that nothing exceeds: the plan then describes the unplanned step."""

LEAST_MARGIN = 1.01
"""The lowest budget tried, over the least feasible one known."""

Where = float | str
"""A share of the predicted unplanned peak, or ``"least"``."""


@dataclass(kw_only=True)
class Bench:
    """One model built on the device, and its plans so far.

    Parameters
    ----------
    subject
        The model.
    device
        Where it lies and runs.
    seed
        Seed of the weights and of the first sample.
    time_limit_s
        Time limit of each solve.
    """

    subject: Subject
    device: torch.device
    seed: int = 0
    time_limit_s: float = 20.0
    model: nn.Module = field(init=False)
    _plans: dict[tuple[int, str], Plan] = field(init=False, default_factory=dict)
    _least_bytes: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model = self.make()

    @property
    def entry(self) -> Device:
        """The device's entry in ``graph_capture.costs.devices``."""
        return device_for(self.device.type)

    def make(self) -> nn.Module:
        """Build the model on the device; the same weights each time."""
        torch.manual_seed(self.seed)
        with self.device:
            return self.subject.build()

    def sample(self, seed: int | None = None) -> dict[str, Tensor]:
        """An input on the device."""
        values = self.subject.sample(self.seed if seed is None else seed)
        return {name: tensor.to(self.device) for name, tensor in values.items()}

    def context(self) -> Any:
        """The autocast that the model trains under."""
        return self.subject.context(self.device.type)

    # -- plans -----------------------------------------------------------------

    def plan(self, budget_bytes: int, cost_model: str = "roofline") -> Plan:
        """A plan of the whole step, optimizer included, without headroom; made once.

        Raises
        ------
        InfeasibleBudgetError
            When nothing fits.
        """
        key = (budget_bytes, cost_model)
        if key not in self._plans:
            with self.context():
                self._plans[key] = optimize(
                    self.model,
                    self.sample(),
                    budget_bytes=budget_bytes,
                    optimizer=self.subject.optimizer,
                    time_limit_s=self.time_limit_s,
                    seed=self.seed,
                    cost_model=cost_model,
                    headroom=0,
                )
        return self._plans[key]

    def knows(self, cost_model: str) -> bool:
        """Whether the unplanned step has been priced by a cost model."""
        return (UNLIMITED_BYTES, cost_model) in self._plans

    def unplanned(self, cost_model: str = "roofline") -> Plan:
        """The plan that has room for everything: its baseline is the unplanned step."""
        return self.plan(UNLIMITED_BYTES, cost_model)

    def least_bytes(self) -> int:
        """The least budget that the planner knows to work."""
        if self._least_bytes is None:
            try:
                self.plan(1)
            except InfeasibleBudgetError as error:
                self._least_bytes = error.min_budget_bytes
            else:
                raise RuntimeError(f"{self.subject.label}: a budget of one byte was called enough")
        return self._least_bytes

    def budget_bytes(self, where: Where) -> int:
        """The budget at a share of the predicted unplanned peak, or near the least feasible."""
        if where == "least":
            return int(LEAST_MARGIN * self.least_bytes())
        return int(float(where) * self.unplanned().baseline_peak_bytes)

    # -- steps -----------------------------------------------------------------

    @contextmanager
    def applied(self, plan: Plan) -> Iterator[nn.Module]:
        """Apply a plan to the model, and remove it afterwards."""
        plan.apply(self.model)
        try:
            yield self.model
        finally:
            Plan.remove(self.model)

    def step_of(
        self, model: nn.Module, *, planned: bool, sample: dict[str, Tensor] | None = None
    ) -> Callable[[], Any]:
        """One seeded training step without an optimizer.

        Parameters
        ----------
        planned
            Whether an applied plan is used; otherwise the model's own forward runs, so
            that both kinds of step can be compared on one set of weights.
        """
        inputs = self.sample() if sample is None else sample

        def step() -> Any:
            model.zero_grad(set_to_none=True)
            torch.manual_seed(self.seed)
            with self.context():
                return train_step(model if planned else without_plan(model), inputs)

        return step


def release(device: torch.device) -> None:
    """Free unused memory, so that the next figure starts from a clean allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def without_plan(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a planned module as if no plan were applied."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unplanned(model):
            return model(*args, **kwargs)

    return call
