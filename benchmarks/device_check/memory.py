"""Compare predicted peaks with the allocator's own record, and measure fragmentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError, measure

from .bench import Bench, Where, release


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One step's peak.

    Parameters
    ----------
    model
        Name of the subject.
    where
        ``"unplanned"``, a share of its predicted peak, or ``"least"``.
    budget_bytes
        ``None`` without a plan.
    infeasible
        Why there is no plan; ``""`` if there is one.
    predicted_bytes
        Peak of the whole step, optimizer included.
    measured_bytes
        Bytes held before the step plus the most that the step allocated: on CUDA by
        ``max_memory_allocated``.
    allocator_bytes
        ``max_memory_allocated`` itself, including everything else that the process holds
        on the device; ``None`` on CPU.
    reserved_bytes
        ``max_memory_reserved``; ``None`` on CPU.
    num_recomputed
        Operators that run more than once.
    overhead, gap
        By the roofline: extra time, and distance to its lower bound.
    solve_s
        Time of the solve.
    """

    model: str
    where: Where
    budget_bytes: int | None
    infeasible: str = ""
    predicted_bytes: int = 0
    measured_bytes: int = 0
    allocator_bytes: int | None = None
    reserved_bytes: int | None = None
    num_recomputed: int = 0
    overhead: float = 0.0
    gap: float = 0.0
    solve_s: float = 0.0

    @property
    def error(self) -> float:
        """Predicted over measured, minus one; above zero is on the safe side."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def within(self) -> bool:
        """Whether the measured peak is not above the budget."""
        return self.budget_bytes is None or self.measured_bytes <= self.budget_bytes

    @property
    def fragmentation(self) -> float | None:
        """Reserved over allocated, minus one; ``None`` on CPU."""
        if self.reserved_bytes is None or not self.allocator_bytes:
            return None
        return self.reserved_bytes / self.allocator_bytes - 1


def check_unplanned(bench: Bench) -> Memory:
    """The step without a plan."""
    predicted = bench.unplanned().baseline_peak_bytes
    return _measured(bench, where="unplanned", budget_bytes=None, predicted_bytes=predicted)


def check_planned(bench: Bench, where: Where) -> Memory:
    """The step by a plan for a budget, see :meth:`Bench.budget_bytes`."""
    budget_bytes = bench.budget_bytes(where)
    try:
        plan = bench.plan(budget_bytes)
    except InfeasibleBudgetError as error:
        return Memory(
            model=bench.subject.name,
            where=where,
            budget_bytes=budget_bytes,
            infeasible=f"the least feasible is {format_bytes(error.min_budget_bytes)}",
        )
    with bench.applied(plan):
        return _measured(
            bench,
            where=where,
            budget_bytes=budget_bytes,
            predicted_bytes=plan.predicted_peak_bytes,
            num_recomputed=len(plan.schedule.recomputed()),
            overhead=plan.overhead,
            gap=plan.gap,
            solve_s=plan.solve_s,
        )


def worst_fragmentation(rows: Iterable[Memory]) -> float | None:
    """The largest fragmentation of planned steps, which is the headroom needed; ``None`` on CPU."""
    seen = [row.fragmentation for row in rows if row.where != "unplanned"]
    return max((x for x in seen if x is not None), default=None)


def _measured(bench: Bench, *, where: Where, budget_bytes: int | None, **figures: float) -> Memory:
    """Measure the step of the bench's model in its current state."""
    subject, device = bench.subject, bench.device
    bench.model.zero_grad(set_to_none=True)
    release(device)
    with bench.context():
        measured = measure(
            bench.model, bench.sample(), optimizer=subject.optimizer, repeats=0, seed=bench.seed
        )
    on_card = device.type == "cuda"
    return Memory(
        model=subject.name,
        where=where,
        budget_bytes=budget_bytes,
        measured_bytes=measured.peak_bytes,
        allocator_bytes=torch.cuda.max_memory_allocated(device) if on_card else None,
        reserved_bytes=measured.reserved_bytes,
        **figures,  # type: ignore[arg-type]
    )
