"""Half of the memory for a fifth of the time: what per-layer checkpointing gives, and the optimum.

Guides promise some 50 % less memory for some 20 % more time. For each model: what
checkpointing every layer gives, the least overhead at half of the peak, and the
least peak at an overhead of 20 %. Peaks are of the whole step, parameters and
gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from solvers.instances import keep_all_peak_bytes

from ..models import Subject
from ..plan_runs import markdown
from .questions import (
    captured_graph,
    least_peak_within,
    optimum_figure,
    strategy_figure,
)

USUAL = ("transformers_per_layer", "uniform_sqrt")
"""What guides recommend: every layer, or segments of sqrt(L) layers."""


def half_row(
    subject: Subject,
    *,
    device: str | None,
    autocast: torch.dtype | None = None,
    optimizer: str | None = None,
    share: float = 0.5,
    overhead: float = 0.2,
    time_limit_s: float,
    seed: int = 0,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """The figures of one model.

    Parameters
    ----------
    device
        ``None`` for the CPU's times.
    share
        Share of the peak at which the optimum is sought.
    overhead
        Overhead at which the least peak is sought.
    time_limit_s
        Time limit of each solve.
    """
    graph = captured_graph(
        subject.build("meta"),
        subject.sample(device="meta"),
        device=device,
        autocast=autocast,
        optimizer=optimizer,
    )
    peak = keep_all_peak_bytes(graph)
    usual = {name: strategy_figure(graph, name) for name in USUAL}
    budget = int(share * peak)
    best = optimum_figure(graph, budget, time_limit_s=time_limit_s, seed=seed)
    least = least_peak_within(
        graph,
        int((1 + overhead) * graph.base_cost_ns),
        time_limit_s=time_limit_s / 2,
        seed=seed,
        known=[f.schedule for f in (*usual.values(), best) if f.schedule is not None],
    )
    row = {
        "model": subject.name,
        "description": subject.description,
        "num_operators": graph.num_operators,
        "peak_bytes": peak,
        "resident_bytes": graph.resident_bytes,
        "usual": {
            name: {
                "share": None if figure.peak_bytes is None else figure.peak_bytes / peak,
                "overhead": figure.overhead,
                "error": figure.error,
            }
            for name, figure in usual.items()
        },
        "share": share,
        "optimum_overhead": best.overhead,
        "optimum_gap": best.gap,
        "optimum_error": best.error,
        "overhead": overhead,
        "least_share": least.peak_bytes / peak,
        "excluded_share": least.excluded_bytes / peak,
    }
    say(", ".join(_line(row)))
    return row


def half_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each model."""
    share, overhead = (rows[0]["share"], rows[0]["overhead"]) if rows else (0.5, 0.2)
    header = [
        "model",
        "peak, GB",
        "per layer: share of the peak, overhead",
        "√L segments",
        f"optimum at {share:.0%}: overhead",
        "gap",
        f"least share at {overhead:.0%} overhead",
        "proven impossible at",
    ]
    return markdown(header, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    usual = [
        "refused" if said["share"] is None else f"{said['share']:.3f}, {said['overhead']:.1%}"
        for said in row["usual"].values()
    ]
    best = [row["optimum_error"], ""]
    if row["optimum_overhead"] is not None:
        best = [f"{row['optimum_overhead']:.2%}", f"{row['optimum_gap']:.2%}"]
    excluded = row["excluded_share"]
    return [
        row["model"],
        f"{row['peak_bytes'] / 1e9:.2f}",
        *usual,
        *best,
        f"{row['least_share']:.3f}",
        f"{excluded:.3f}" if excluded > 0 else "",
    ]
