"""Square-root memory on chains: each strategy's memory as chains grow, and its cost.

Chen et al. 2016 (arXiv:1604.06174): segments of sqrt(L) layers need O(sqrt(L)) memory
for one more forward pass, which is a third of a step whose backward pass takes twice as
long as its forward pass. Recursion needs O(log L) memory for more time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graph_capture.cost_graph import CostGraph
from solvers.replay import replay
from solvers.schedule import Schedule

from ..growth import power_law
from ..plan_runs import markdown
from .questions import (
    Figure,
    forward_ns,
    optimum_figure,
    strategy_figure,
)

PER_LAYER = "transformers_per_layer"
STRATEGIES = (
    "none",
    "uniform_sqrt",
    "chen_greedy",
    "chen_recursive",
    "revolve",
    PER_LAYER,
)
FIT_FROM = 16
"""Layers from which the growth is fitted; below, constants matter as much as the chain."""


def chain_rows(
    family: str,
    num_layers: int,
    graph: CostGraph,
    *,
    time_limit_s: float,
    seed: int = 0,
    say: Callable[[str], None] = lambda words: None,
) -> list[dict[str, Any]]:
    """A row for each strategy: its peak and overhead, and what the optimum pays at that peak.

    The search for the optimum begins with the strategy's own schedule.
    """
    rows = []
    outcome = replay(graph, Schedule.keep_all(graph))
    for name in STRATEGIES:
        if name == PER_LAYER and graph.num_operators == 2 * num_layers + 1:
            continue  # a layer of one operator has nothing to drop inside
        figure = strategy_figure(graph, name, time_limit_s=time_limit_s, seed=seed)
        best = Figure(strategy="auto", error=figure.error)
        if figure.peak_bytes is not None and figure.overhead:
            best = optimum_figure(
                graph,
                figure.peak_bytes,
                time_limit_s=time_limit_s,
                seed=seed,
                hint=figure.schedule,
            )
        elif not figure.error:
            best = Figure(strategy="auto", overhead=0.0, fits=True, bound=0.0)
        row = {
            "family": family,
            "num_layers": num_layers,
            "num_operators": graph.num_operators,
            "strategy": name,
            "setting": figure.setting,
            "peak_bytes": figure.peak_bytes,
            "overhead": figure.overhead,
            "optimum_overhead": best.overhead,
            "optimum_gap": best.gap,
            "keep_all_bytes": outcome.peak_bytes,
            "forward_share": forward_ns(graph) / graph.base_cost_ns,
            "error": figure.error or best.error,
        }
        say(_words(row))
        rows.append(row)
    return rows


def growth_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponent of each strategy's peak over the number of layers, from ``FIT_FROM`` on."""
    fits = []
    for family in dict.fromkeys(row["family"] for row in rows):
        for name in STRATEGIES:
            points = [
                (row["num_layers"], float(row["peak_bytes"]))
                for row in rows
                if row["family"] == family
                and row["strategy"] == name
                and row["peak_bytes"] is not None
                and row["num_layers"] >= FIT_FROM
            ]
            law = power_law(points)
            exponent = None if law is None else law.exponent
            fits.append({"family": family, "strategy": name, "exponent": exponent})
    return fits


def chain_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: peaks and overheads by number of layers, then exponents."""
    parts = []
    fits = {(fit["family"], fit["strategy"]): fit["exponent"] for fit in growth_rows(rows)}
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        sizes = list(dict.fromkeys(row["num_layers"] for row in own))
        header = ["strategy", *(f"L = {size}" for size in sizes), "exponent of the peak"]
        lines = []
        for name in STRATEGIES:
            cells = {row["num_layers"]: _cell(row) for row in own if row["strategy"] == name}
            if not cells:
                continue
            exponent = fits[family, name]
            lines.append(
                [
                    f"`{name}`",
                    *(cells.get(size, "") for size in sizes),
                    "" if exponent is None else f"{exponent:.2f}",
                ]
            )
        share = own[-1]["forward_share"]
        parts.append(
            f"## {family}\n\nPeak as a share of keeping everything; overhead; in brackets what "
            f"the optimum pays at that peak. A forward pass is {share:.1%} of the step.\n\n"
            + markdown(header, lines)
        )
    return "\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    if row["peak_bytes"] is None:
        return "–"
    share = row["peak_bytes"] / row["keep_all_bytes"]
    optimum = row["optimum_overhead"]
    best = "" if optimum is None else f" ({optimum:.1%})"
    return f"{share:.3f}; {row['overhead']:.1%}{best}"


def _words(row: dict[str, Any]) -> str:
    head = f"{row['family']}, {row['num_layers']} layers, {row['strategy']}: "
    return head + (_cell(row) if not row["error"] else row["error"])
