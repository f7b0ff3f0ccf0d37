"""Draw memory over the step, moment by moment, for several plans below each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph_capture.cost_graph import CostGraph
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy

from ..plan_record import PlanRecord
from .memory_timeline import (
    GRADIENTS,
    GROUPS,
    INOUT,
    MODEL,
    OPTIMIZER,
    RECOMPUTED,
    RESIDENT,
    SAVED,
    TEMPORARIES,
    WORKSPACE,
    MemoryTimeline,
    memory_timeline,
)
from .style import (
    BLACK,
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    VERMILLION,
    byte_unit,
    check_suffix,
    draw_grid,
    house_style,
    new_figure,
    set_title,
    shown_bytes,
    time_unit,
    write_figure,
)
from .titles import title_of_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_INCHES = 1.9
PER_LAYER = "transformers_per_layer"
_TIP_BELOW = 7
"""matplotlib's CARETDOWN: a triangle that stands on the point."""

_LOOKS: Mapping[str, tuple[str, str]] = {  # colour and hatch
    MODEL: ("#CFCFCF", ""),
    OPTIMIZER: (GREY, "...."),
    GRADIENTS: (GREEN, "\\\\\\\\"),
    INOUT: (SKY, ""),
    SAVED: (BLUE, ""),
    RECOMPUTED: (ORANGE, "////"),
    TEMPORARIES: (VERMILLION, ""),
    WORKSPACE: (PINK, "xxxx"),
    RESIDENT: ("#CFCFCF", "xx"),
}


def plot_memory(
    plans: PlanRecord | Mapping[str, PlanRecord | tuple[CostGraph, Schedule]],
    path: str | Path | None = None,
    *,
    budget_bytes: int | None = None,
    title: str = "",
) -> Figure:
    """Draw memory over the step, stacked by what it holds.

    Parameters
    ----------
    plans
        By label, one panel each: plans, or schedules with their graphs. A single plan
        is drawn below the step that recomputes nothing and, if the model has repeated
        blocks, the step that recomputes each of them.
    path
        ``.png`` or ``.svg``; written when given.
    budget_bytes
        Drawn as a line; by default the budget of the plans, if they agree.
    title
        What the figure shows, for example model and batch; device and dtype are added
        if known.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    ValueError
        When there is nothing to draw, or the path has another suffix.
    """
    check_suffix(path)
    panels = dict(plans) if isinstance(plans, Mapping) else beside(plans)
    if not panels:
        raise ValueError("there is no plan to draw; give one, or several by label")
    known = [p for p in panels.values() if not isinstance(p, tuple)]
    if budget_bytes is None and len({p.budget_bytes for p in known}) == 1:
        budget_bytes = known[0].budget_bytes
    timelines = {
        label: memory_timeline(*(p if isinstance(p, tuple) else (p.graph, p.schedule)))
        for label, p in panels.items()
    }
    with house_style():
        figure = new_figure(1.5 + PANEL_INCHES * len(panels))
        _draw(figure, timelines, budget_bytes)
        set_title(figure, title_of_plan(title or "Memory over one step", known[-1:]))
        write_figure(figure, path)
    return figure


def beside(plan: PlanRecord) -> dict[str, PlanRecord | tuple[CostGraph, Schedule]]:
    """A plan, and before it the steps that it is compared with, on the same graph."""
    panels: dict[str, PlanRecord | tuple[CostGraph, Schedule]] = {
        "nothing recomputed": (plan.graph, Schedule.keep_all(plan.graph))
    }
    try:
        outcome = apply_strategy(STRATEGIES[PER_LAYER], plan.graph)
    except StrategyError:
        pass  # a model without repeated blocks has no such step: the panel is left out
    else:
        panels["every block recomputed"] = (plan.graph, outcome.schedule)
    panels["plan"] = plan
    return panels


def _draw(figure: Figure, timelines: Mapping[str, MemoryTimeline], budget: int | None) -> None:
    highest = max([t.peak_bytes for t in timelines.values()] + [budget or 0])
    unit_bytes, unit = byte_unit(highest)
    unit_us, time = time_unit(max(t.step_us for t in timelines.values()))
    shown = [
        g for g, name in enumerate(GROUPS) if any(t.num_bytes[g].any() for t in timelines.values())
    ]
    axes = figure.subplots(len(timelines), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    base_us = next(iter(timelines.values())).step_us
    for axis, (label, timeline) in zip(axes, timelines.items(), strict=True):
        _stack(axis, timeline, shown, unit_bytes, unit_us)
        _mark(axis, timeline, unit_bytes, unit_us)
        if budget is not None:
            axis.axhline(budget / unit_bytes, color=BLACK, linestyle="--", linewidth=1.3)
        longer = ""
        if timeline.step_us != base_us and base_us:
            longer = f" ({timeline.step_us / base_us - 1:+.1%})"
        axis.set_title(
            f"{label}: peak {shown_bytes(timeline.peak_bytes)}, "
            f"step {timeline.step_us / unit_us:.3g} {time}{longer}",
            loc="left",
        )
        axis.set_ylabel(unit)
        draw_grid(axis, "y")
    axes[0].set_ylim(0, 1.14 * highest / unit_bytes)
    axes[0].set_xlim(0, max(t.step_us for t in timelines.values()) / unit_us or 1)
    axes[-1].set_xlabel(f"time of the step by the cost model, {time}")
    _legend(figure, shown, budget)


def _stack(
    axis: Any, timeline: MemoryTimeline, shown: list[int], unit_bytes: float, unit_us: float
) -> None:
    edges = timeline.edges_us / unit_us
    tops = timeline.num_bytes.cumsum(axis=0) / unit_bytes
    for g in shown:
        colour, hatch = _LOOKS[GROUPS[g]]
        axis.stairs(
            tops[g],
            edges,
            baseline=tops[g - 1] if g else 0,
            fill=True,
            facecolor=colour,
            edgecolor="white" if hatch else "none",
            hatch=hatch or None,
            linewidth=0,
            label=GROUPS[g],
        )
    axis.stairs(tops[-1], edges, baseline=None, color=DARK, linewidth=0.8)


def _mark(axis: Any, timeline: MemoryTimeline, unit_bytes: float, unit_us: float) -> None:
    """Mark the peak, and the beginning of the backward pass."""
    at_us = timeline.edges_us[timeline.peak_run : timeline.peak_run + 2].mean()
    axis.plot(
        [at_us / unit_us],
        [timeline.peak_bytes / unit_bytes],
        marker=_TIP_BELOW,
        markersize=8,
        color=BLACK,
        linestyle="none",
        label="peak",
        clip_on=False,
        zorder=5,
    )
    if 0 < timeline.turn < len(timeline.total_bytes):
        axis.axvline(timeline.turn_us / unit_us, color=DARK, linestyle=":", linewidth=1.2)


def _legend(figure: Figure, shown: list[int], budget: int | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for g in reversed(shown):
        colour, hatch = _LOOKS[GROUPS[g]]
        edge = "white" if hatch else "none"
        handles.append(
            Patch(facecolor=colour, edgecolor=edge, hatch=hatch or None, label=GROUPS[g])
        )
    handles.append(
        Line2D([], [], marker=_TIP_BELOW, color=BLACK, markersize=7, linestyle="none", label="peak")
    )
    handles.append(Line2D([], [], color=DARK, linestyle=":", label="backward begins"))
    if budget is not None:
        label = f"budget, {shown_bytes(budget)}"
        handles.append(Line2D([], [], color=BLACK, linestyle="--", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
