"""Graphs and comparisons small enough to count by hand, for tests of figures."""

from __future__ import annotations

from typing import Any

from graph_capture.cost_graph import CostGraph, Operator, Storage
from planner.comparing.comparison import Comparison
from planner.comparison_record import BudgetBound, ComparisonRow, MeasuredStep
from solvers.scopes import BoundScope

MB = 10**6


def two_layers() -> CostGraph:
    """Two layers of a product and an activation; the gradient of each reads both.

    Parameters 10 bytes; h0 and h1 are 8 bytes, a0 and a1 4; each gradient 2
    bytes, kept. Costs: product 5 us, activation 1 us, backward 10 us.
    """

    def layer(i: int, reads: int) -> tuple[Operator, Operator]:
        path = f"layers.{i}"
        return (
            Operator(
                name=f"mm{i}",
                target="aten.mm.default",
                inputs=(0, reads),
                outputs=(2 * i + 1,),
                cost_ns=5000,
                workspace_bytes=3,
                module_path=f"{path}.linear",
            ),
            Operator(
                name=f"relu{i}",
                target="aten.relu.default",
                inputs=(2 * i + 1,),
                outputs=(2 * i + 2,),
                cost_ns=1000,
                module_path=path,
            ),
        )

    backward = tuple(
        Operator(
            name=f"back{i}",
            target="aten.mm.default",
            inputs=(2 * i + 1, 2 * i + 2),
            outputs=(6 - i,),
            cost_ns=10000,
            phase="backward",
        )
        for i in (1, 0)
    )
    storages = (
        Storage(name="weight", size_bytes=10, producer=None, category="parameter"),
        Storage(name="h0", size_bytes=8, producer=0),
        Storage(name="a0", size_bytes=4, producer=1),
        Storage(name="h1", size_bytes=8, producer=2),
        Storage(name="a1", size_bytes=4, producer=3),
        Storage(name="g1", size_bytes=2, producer=4, category="gradient", kept=True),
        Storage(name="g0", size_bytes=2, producer=5, category="gradient", kept=True),
    )
    return CostGraph((*layer(0, 0), *layer(1, 2), *backward), storages)


def row(strategy: str, peak_bytes: int, overhead: float, **more: Any) -> ComparisonRow:
    """A strategy's row with a prediction, beside a step of 100 us."""
    fields: dict[str, Any] = {
        "strategy": strategy,
        "predicted_peak_bytes": peak_bytes,
        "predicted_step_us": 100.0 * (1 + overhead),
        "overhead": overhead,
        "fits": True,
    }
    return ComparisonRow(**(fields | more))


def step(peak_bytes: int, ratio: float, **more: Any) -> MeasuredStep:
    """Real steps that took ``ratio`` of eager's time."""
    fields: dict[str, Any] = {
        "peak_bytes": peak_bytes,
        "step_us": 100.0 * ratio,
        "eager_us": 100.0,
        "ratio": ratio,
        "quartiles": (ratio - 0.01, ratio + 0.02),
        "num_pairs": 8,
        "bits": "equal",
    }
    return MeasuredStep(**(fields | more))


def bound(budget_bytes: int, overhead: float | None) -> BudgetBound:
    """What is proven within a budget, as an overhead; ``None`` where nothing fits."""
    return BudgetBound(
        budget=f"{budget_bytes}B",
        budget_bytes=budget_bytes,
        lower_bound_us=None if overhead is None else 100.0 * (1 + overhead),
        scope=BoundScope.BASE_ORDER,
    )


def comparison(*rows: ComparisonRow, bounds: tuple[BudgetBound, ...] = ()) -> Comparison:
    """Of a step of 100 MB and 100 us, with 30 MB at the least."""
    return Comparison(
        model="Chain",
        rows=rows,
        bounds=bounds,
        baseline_peak_bytes=100 * MB,
        baseline_step_us=100.0,
        least_bytes=32 * MB,
        least_bound_bytes=30 * MB,
        device="a card",
        cost_model="roofline",
        fingerprint="f",
        seed=0,
        versions={"torch": "2.13.0"},
    )


def whole_comparison() -> Comparison:
    """Ours at two budgets, two strategies of one schedule, a failed one, and a peer."""
    return comparison(
        row("none", 100 * MB, 0.0),
        row("uniform_sqrt", 60 * MB, 0.30, measured=step(61 * MB, 1.32)),
        row("auto", 40 * MB, 0.20, budget="40%", measured=step(40 * MB, 1.21)),
        row("auto", 60 * MB, 0.10, budget="60%"),
        ComparisonRow(strategy="rotor", budget="40%", error="no chain"),
        row("mine", 70 * MB, 0.25),
        ComparisonRow(strategy="per block", kind="peer", measured=step(50 * MB, 1.33)),
        bounds=(bound(40 * MB, 0.19), bound(60 * MB, 0.09)),
    )
