"""Checkmate's experiments, as far as a cost model allows.

Jain et al. 2020, *Checkmate: Breaking the Memory Wall with Optimal Tensor
Rematerialization* (MLSys 2020, arXiv:1910.02653): overhead against budget for
VGG-16, MobileNet and U-Net, and the largest batch in 16 GB that costs at most one
more forward pass for six networks, on a V100. Here the networks are PyTorch's, not
Keras's, times are by roofline, not profiled, and kernels' scratch memory is not
counted. So shares and ratios can be compared with the paper's, but bytes cannot. The
paper's U-Net has the encoder of a VGG.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graph_capture.cost_graph import CostGraph
from graph_capture.costs.devices import Device
from graph_capture.costs.gpu_efficiency import ASSUMED
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy

from ..models import (
    SUBJECTS,
    Size,
)
from ..plan_runs import markdown
from .batches import (
    Find,
    LargestBatch,
    Rule,
    StepLine,
    largest_batch,
)
from .questions import (
    NOTHING_FITS,
    NOTHING_FOUND,
    Figure,
    answer,
    captured_graph,
    optimum_figure,
    strategy_figure,
)

V100 = Device(
    name="v100",
    title="NVIDIA V100 16 GB SXM2",
    torch_type="cuda",
    flops_per_s={
        torch.float64: 7.8e12,
        torch.float32: 15.7e12,
        torch.float16: 125e12,
        torch.bfloat16: 15.7e12,  # no units for it before Ampere
    },
    bytes_per_s=900e9,
    launch_ns=4_000,
    efficiency=ASSUMED,
    memory_bytes=16 * 10**9,
    source="NVIDIA V100 Tensor Core GPU data sheet, NVLink column",
)
"""The paper's card; not in the table of devices, because nothing else needs it."""

SWEPT = ("vgg16", "mobilenet", "unet")
SWEPT_STRATEGIES = (
    "ap_sqrt",
    "ap_greedy",
    "linearized_sqrt",
    "linearized_greedy",
    "chen_greedy",
    "revolve",
    "checkmate_lp_rounding",
)
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Budgets between the least peak and that of keeping everything."""

ENLARGED = ("unet", "fcn8", "segnet", "vgg19", "resnet50", "mobilenet")
ENLARGED_STRATEGIES = ("none", "ap_sqrt", "linearized_sqrt", "ap_greedy", "linearized_greedy")

PUBLISHED = """\
Published: "up to 5.1x larger input sizes" (the paper's abstract), the largest ratio over its six
networks. For VGG-19 its artifact's instructions list, in 16 GB: keeping everything 164, sqrt(n)
196, greedy 260 images (github.com/parasj/checkmate, `mlsys20_artifact.md`); the paper's own bars
were not at hand. The rule of one more forward pass and the 16 GB are those of its scripts.
"""


def sweep_rows(
    name: str,
    *,
    size: Size = "paper",
    shares: Sequence[float] = SHARES,
    strategies: Sequence[str] = SWEPT_STRATEGIES,
    time_limit_s: float,
    seed: int = 0,
    say: Callable[[str], None] = lambda words: None,
) -> list[dict[str, Any]]:
    """A row for each strategy and budget of one network, ours with its bound."""
    subject = SUBJECTS[name](size)
    graph = captured_graph(subject.build("meta"), subject.sample(device="meta"), device=V100)
    most = keep_all_peak_bytes(graph)
    least = least_memory(graph, time_limit_s=time_limit_s, seed=seed)
    rows = []
    for share in shares:
        budget = round(least.peak_bytes + share * (most - least.peak_bytes))
        figures = [
            strategy_figure(graph, s, budget_bytes=budget, time_limit_s=time_limit_s, seed=seed)
            for s in strategies
        ]
        hint = least.schedule if share == 0 else None
        figures.append(
            optimum_figure(graph, budget, time_limit_s=time_limit_s, seed=seed, hint=hint)
        )
        for figure in figures:
            rows.append(
                {
                    "model": name,
                    "description": subject.description,
                    "share": share,
                    "budget_bytes": budget,
                    "least_bytes": least.peak_bytes,
                    "keep_all_bytes": most,
                    "strategy": figure.strategy,
                    "setting": figure.setting,
                    "peak_bytes": figure.peak_bytes,
                    "overhead": figure.overhead,
                    "fits": figure.fits,
                    "bound": figure.bound,
                    "gap": figure.gap,
                    "error": figure.error,
                }
            )
        say(f"{name}, {budget / 1e9:.2f} GB: ours {_overhead(figures[-1])}")
    return rows


def sweep_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each network, strategies by budgets."""
    parts = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        budgets = list(dict.fromkeys(row["budget_bytes"] for row in own))
        lines = []
        for strategy in dict.fromkeys(row["strategy"] for row in own):
            of = {row["budget_bytes"]: row for row in own if row["strategy"] == strategy}
            lines.append([f"`{strategy}`", *(_swept(of[budget]) for budget in budgets)])
        ours = {row["budget_bytes"]: row for row in own if row["strategy"] == "auto"}
        lines.append(["gap of `auto`", *(_gap(ours[budget]["gap"]) for budget in budgets)])
        header = ["overhead at a budget of", *(f"{budget / 1e9:.2f} GB" for budget in budgets)]
        parts.append(
            f"## {name}: {own[0]['description']}\n\nKeeping everything needs "
            f"{own[0]['keep_all_bytes'] / 1e9:.2f} GB. –: does not fit; ×: proven that "
            "nothing fits; ?: nothing found within the limit; n/a: does not apply.\n\n"
            + markdown(header, lines)
        )
    return "\n".join(parts)


def batch_rows(
    name: str,
    *,
    size: Size = "paper",
    rule: Rule,
    strategies: Sequence[str] = ENLARGED_STRATEGIES,
    captured_at: tuple[int, int] = (32, 64),
    time_limit_s: float,
    seed: int = 0,
    say: Callable[[str], None] = lambda words: None,
) -> list[dict[str, Any]]:
    """A row for each strategy: the largest batch of one network within the rule."""
    subject = SUBJECTS[name](size)
    line = StepLine.of(subject, V100, *captured_at)
    rows: list[dict[str, Any]] = []
    start = captured_at[0]

    def add(strategy: str, found: LargestBatch) -> None:
        rows.append(
            {
                "model": name,
                "image": subject.tensors[next(iter(subject.tensors))].shape[1:],
                "budget_bytes": rule.budget_bytes,
                "extra_forwards": rule.extra_forwards,
                "strategy": strategy,
                "batch": found.batch,
                "excluded": found.excluded,
                "peak_bytes": found.peak_bytes,
                "overhead": found.overhead,
            }
        )
        say(f"{name}, {strategy}: {found.batch} images")

    for strategy in strategies:
        found = largest_batch(line, rule, by_strategy(strategy, seed), start=start)
        start = max(1, found.batch)
        add(strategy, found)
    best = max(1, *(row["batch"] for row in rows)) if rows else start
    find = by_solving(time_limit_s, seed)
    add("auto", largest_batch(line, rule, find, start=best, prove=True))
    return rows


def batch_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each network, with batches by strategy and our gain."""
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    header = [
        "images",
        *(f"`{strategy}`" for strategy in strategies),
        "at most, by interpolation",
        "ours / none",
        "ours / best heuristic",
        "overhead there: heuristic, ours",
    ]
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {row["strategy"]: row for row in rows if row["model"] == name}
        batches = {strategy: own[strategy]["batch"] for strategy in strategies}
        ours = batches["auto"]
        others = [own[s] for s in strategies if s not in ("auto", "none")]
        # The fastest of the heuristics that reach the same batch.
        best = max(others, key=lambda row: (row["batch"], -(row["overhead"] or 0.0)))
        excluded = own["auto"]["excluded"]
        lines.append(
            [
                name,
                *(str(batches[strategy]) for strategy in strategies),
                "" if excluded is None else str(excluded - 1),
                _ratio(ours, batches.get("none", 0)),
                _ratio(ours, best["batch"]),
                ", ".join(
                    "–" if row["overhead"] is None else f"{row['overhead']:.1%}"
                    for row in (best, own["auto"])
                ),
            ]
        )
    return markdown(header, lines)


def by_strategy(name: str, seed: int = 0) -> Find:
    """A strategy of the registry, at the cheapest of its settings that fits."""

    def find(
        graph: CostGraph, rule: Rule, schedule: Schedule | None
    ) -> tuple[Schedule | None, bool]:
        try:
            outcome = apply_strategy(
                STRATEGIES[name], graph, budget_bytes=rule.budget_bytes, seed=seed
            )
        except StrategyError:
            return None, False
        return (outcome.schedule if rule.allows(graph, outcome.schedule) else None), False

    return find


def by_solving(time_limit_s: float, seed: int = 0) -> Find:
    """Any schedule that the solver finds, or its proof that there is none."""

    def find(
        graph: CostGraph, rule: Rule, schedule: Schedule | None
    ) -> tuple[Schedule | None, bool]:
        said = answer(
            graph,
            rule.budget_bytes,
            rule.cost_limit_ns(graph),
            time_limit_s=time_limit_s,
            seed=seed,
            hint=schedule,
        )
        return said.schedule, said.excluded

    return find


def _swept(row: dict[str, Any]) -> str:
    if row["error"]:
        known = {NOTHING_FITS: "×", NOTHING_FOUND: "?"}
        return next((sign for words, sign in known.items() if words in row["error"]), "n/a")
    if not row["fits"]:
        return "–"
    return f"{row['overhead']:.1%}"


def _overhead(figure: Figure) -> str:
    return figure.error or f"{figure.overhead:.2%}, gap {_gap(figure.gap)}"


def _gap(gap: float | None) -> str:
    return "" if gap is None else f"{gap:.2%}"


def _ratio(ours: int, other: int) -> str:
    return f"{ours / other:.2f}" if other else ""
