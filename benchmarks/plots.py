"""The plots of a benchmark. Times are on a logarithmic axis from a hundredth of a second on.

Colours, line styles and markers are those of ``planner/plots/style.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

from planner.plots.style import COLOURS, LINES, MARKERS

from .run import Run, best_costs, gap_of

if TYPE_CHECKING:
    from .growth import Growth

mpl.use("Agg")
import matplotlib.pyplot as plt

FIRST_S = 0.01
LAST = 1.2
"""Times are shown up to this share of the limit: some schedules come right at it."""
NO_GAP = 1e-4
"""Where gaps are cut off below: what counts as proven."""


def plot_profiles(runs: Sequence[Run], path: Path, limit_s: float) -> None:
    """Share of cases in which each solver was within 1 % of the best, and had a proof, by time."""
    best = best_costs(list(runs))
    panels: list[tuple[str, Callable[[Run], float | None]]] = [
        ("schedule within 1 % of the best", lambda r: r.within_s(best.get((r.instance, r.budget)))),
        ("proven (gap ≤ 0.01 %, or infeasible)", lambda r: r.proof_s),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (title, reached_s) in zip(axes, panels, strict=True):
        for solver, style in _styles(runs):
            own = [row for row in runs if row.solver == solver]
            times = sorted(t for t in map(reached_s, own) if t is not None)
            x = [FIRST_S, *(max(FIRST_S, t) for t in times), LAST * limit_s]
            y = [0.0, *((i + 1) / len(own) for i in range(len(times))), len(times) / len(own)]
            axis.step(x, y, where="post", label=solver, **style)
        _time_axis(axis, limit_s)
        axis.set_title(title)
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("share of cases")
    _save(figure, path, axes[0])


def plot_gaps(runs: Sequence[Run], path: Path, limit_s: float) -> None:
    """Median over cases, by time: how far schedules are from the best bound, and own gaps.

    The best bound of a case is the highest one that any solver ended with, of
    those that speak of every schedule in base order. Cases that nobody found a
    schedule for are left out.
    """
    highest = _highest_bounds(runs)
    panels: list[tuple[str, Callable[[Run, int], float]]] = [
        (
            "schedule to the best bound of all",
            lambda r, i: gap_of(r.moments[i].cost_ns, highest.get((r.instance, r.budget))),
        ),
        ("schedule to the solver's own bound", lambda r, i: r.moments[i].gap),
    ]
    solvable = set(best_costs(list(runs)))
    times = np.geomspace(FIRST_S, LAST * limit_s, 200)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (title, gap_at) in zip(axes, panels, strict=True):
        for solver, style in _styles(runs):
            own = [r for r in runs if r.solver == solver and (r.instance, r.budget) in solvable]
            if not own:
                continue
            gaps = np.median([[_at(row, t, gap_at) for t in times] for row in own], axis=0)
            shown = np.where(np.isfinite(gaps), np.maximum(gaps, NO_GAP), np.nan)
            axis.plot(times, 100 * shown, label=solver, **style)
        _time_axis(axis, limit_s)
        axis.set_yscale("log")
        axis.set_title(title)
    axes[0].set_ylabel("median gap, % of the step")
    _save(figure, path, axes[0])


def plot_growth(growth: Growth, path: Path) -> None:
    """Time against the number of layers, both logarithmic, with the fitted power of each mark."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for (mark, points), colour, marker in zip(growth.marks().items(), COLOURS, MARKERS):
        fit = growth.fit(mark)
        label = mark if fit is None else f"{mark}: layers^{fit.exponent:.2f}"
        layers = [x for x, _ in points]
        axis.plot(layers, [y for _, y in points], marker, color=colour, label=label)
        if fit is not None:
            axis.plot(layers, [fit.at(x) for x in layers], "-", color=colour, linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("layers")
    axis.set_ylabel("s")
    axis.set_title(f"{growth.family} at {growth.budget:g} of its peak, solver {growth.solver}")
    axis.grid(alpha=0.3)
    _save(figure, path, axis)


def _highest_bounds(runs: Sequence[Run]) -> dict[tuple[str, float], int]:
    highest: dict[tuple[str, float], int] = {}
    for row in runs:
        if row.global_bound_ns is not None:
            key = (row.instance, row.budget)
            highest[key] = max(highest.get(key, 0), row.global_bound_ns)
    return highest


def _at(row: Run, time_s: float, gap_at: Callable[[Run, int], float]) -> float:
    """The least gap up to ``time_s``; infinite before the first schedule."""
    reached = [i for i, moment in enumerate(row.moments) if moment.elapsed_s <= time_s]
    return gap_at(row, reached[-1]) if reached else math.inf


def _styles(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, Any]]]:
    solvers = list(dict.fromkeys(row.solver for row in runs))
    lines = [line for line in LINES for _ in range(len(COLOURS))]
    for i, (solver, colour) in enumerate(zip(solvers, cycle(COLOURS))):
        yield solver, {"color": colour, "linestyle": lines[(i * 9) % len(lines)], "linewidth": 1.8}


def _time_axis(axis: Any, limit_s: float) -> None:
    axis.set_xscale("log")
    axis.set_xlim(FIRST_S, LAST * limit_s)
    axis.set_xlabel("s")
    axis.grid(alpha=0.3)


def _save(figure: Any, path: Path, axis: Any) -> None:
    """Write ``figure``, with the legend of ``axis`` if it has one."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
