"""Draw peak memory against overhead for all strategies, and the unreachable region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solvers.scopes import BoundScope

from ..comparison_record import ComparisonRecord
from .points import Point, curves, staircase, unreachable
from .style import (
    BLACK,
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PALE,
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
    write_figure,
)
from .titles import title_of_comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_HIGHLIGHTED = 11
LEAST_TOP = 0.02
HIGHEST_TOP = 1.0
"""Overheads beyond 100 % are drawn at the upper edge: they would flatten all others."""

RANKING = (
    "transformers_per_layer",
    "uniform_sqrt",
    "chen_greedy",
    "megatron_selective",
    "save_only_matmuls",
    "revolve",
    "rotor",
    "rotor_menus",
    "dtr",
    "min_cut",
    "checkmate_lp_rounding",
    "checkmate_milp",
    "moccasin",
    "save_matmuls_per_block",
    "uniform_every_k",
)
"""The strategies shown in colours if there are too many."""

_LOOKS = (  # colour, marker, line: any two differ in two of them
    (VERMILLION, "s", "--"),
    (GREEN, "D", "-."),
    (PINK, "^", ":"),
    (ORANGE, "v", "--"),
    (SKY, "P", "-."),
    (VERMILLION, "X", ":"),
    (GREEN, "<", "--"),
    (PINK, ">", "-."),
    (ORANGE, "h", ":"),
    (SKY, "d", "--"),
    (ORANGE, "p", "-."),
)
_EAGERS_ORDER = "in eager's order"
_SHORT_SCOPES = {BoundScope.BASE_ORDER: _EAGERS_ORDER}

_PEER_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h")

Points = Mapping[str, Sequence[Point]]


def plot_pareto(
    comparison: ComparisonRecord,
    path: str | Path | None = None,
    *,
    measured: bool = False,
    highlight: Sequence[str] = (),
) -> Figure:
    """Draw peak memory against overhead: each strategy, peers, and the lower bound.

    All figures are predictions or, with ``measured``, those of real steps. Peers have only
    measured figures, and hollow markers. Bars are quartiles. A line is a staircase: a plan
    serves every larger budget up to the next plan. For predictions, the next plan is the
    next one that takes less time; for real steps it is every one, so as not to select by
    noise. The region is what the comparison's bounds prove about predicted times: between
    two budgets the bound of the upper one, and left of the least peak everything. With
    measured figures it is an outline, which noise may cross.

    Parameters
    ----------
    path
        ``.png`` or ``.svg``; written when given.
    measured
        Show real steps instead of predictions.
    highlight
        Strategies to show in colours. By default the user's own, then the best known
        ones, eleven in all; the others are grey.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    ValueError
        When no row has figures to draw, ``highlight`` names a strategy that
        the comparison does not have or too many, or the path has another suffix.
    """
    check_suffix(path)
    strategies = curves(
        (row for row in comparison.rows if row.kind == "strategy"), measured=measured
    )
    peers = curves((row for row in comparison.rows if row.kind == "peer"), measured=measured)
    if not strategies and not peers:
        kind = "measured" if measured else "predicted"
        raise ValueError(
            f"none of {len(comparison.rows)} rows has a {kind} peak and overhead to draw"
        )
    chosen = _highlighted(comparison, strategies, highlight)
    with house_style():
        figure = new_figure(5.2)
        axis = figure.subplots()
        _Pareto(axis, comparison, measured).draw(strategies, peers, chosen)
        figure.legend(loc="outside right center")
        what = "peak memory against overhead"
        title = title_of_comparison(what, comparison, predicted=not measured, measured=measured)
        set_title(figure, title)
        write_figure(figure, path)
    return figure


def _highlighted(comparison: ComparisonRecord, drawn: Points, wanted: Sequence[str]) -> list[str]:
    """Names of the strategies in colours, in the order of their looks."""
    names = {row.strategy for row in comparison.rows if row.kind == "strategy"}
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(
            f"no strategy {unknown[0]!r} in this comparison; there are {', '.join(sorted(names))}"
        )
    if len(wanted) > MOST_HIGHLIGHTED:
        raise ValueError(
            f"{len(wanted)} strategies cannot be told apart; highlight {MOST_HIGHLIGHTED} at most"
        )
    others = [name for name in drawn if name not in (comparison.ours, "none")]
    if wanted:
        return [name for name in wanted if name in others]
    registered = _registered()
    own = [name for name in others if name not in registered]
    known = [name for name in RANKING if name in others and name not in own]
    rest = [name for name in others if name not in own and name not in known]
    return [*own, *known, *rest][:MOST_HIGHLIGHTED]


def _registered() -> set[str]:
    from solvers.strategies import STRATEGIES

    return {*STRATEGIES, *RANKING}


class _Pareto:
    """One axis of a Pareto plot; overheads in per cent, peaks in the axis' unit."""

    def __init__(self, axis: Any, comparison: ComparisonRecord, measured: bool) -> None:
        self.axis, self.comparison, self.measured = axis, comparison, measured
        self.base_bytes = comparison.baseline_peak_bytes
        self.unit_bytes, self.unit = 1.0, "B"
        self.top = LEAST_TOP
        self.beyond = False

    def draw(self, strategies: Points, peers: Points, chosen: Sequence[str]) -> None:
        """Everything but the legend and the title."""
        points = [p for own in (*strategies.values(), *peers.values()) for p in own]
        self._scale(points)
        self._bound()
        grey = [name for name in strategies if name not in (*chosen, self.comparison.ours, "none")]
        for i, name in enumerate(grey):
            label = ", ".join(grey) if len(grey) < 3 else f"{len(grey)} others"
            label = "_" if i else label
            self._curve(strategies[name], label, GREY, ".", "-", linewidth=0.8, zorder=2)
        for (colour, marker, line), name in zip(_style_of(chosen), chosen):
            self._curve(strategies[name], name, colour, marker, line)
        ours = strategies.get(self.comparison.ours, ())
        label = f"{self.comparison.ours} (ours)"
        # smaller, so that points beneath remain visible
        self._curve(ours, label, BLUE, "o", "-", linewidth=2.6, markersize=5.5, zorder=5)
        for i, (name, own) in enumerate(peers.items()):
            self._peer(name, own, _PEER_MARKERS[i % len(_PEER_MARKERS)])
        self._unplanned()
        self._axes()

    def _scale(self, points: Sequence[Point]) -> None:
        peaks = [p.peak_bytes for p in points] + [self.base_bytes]
        least = min([*peaks, self.comparison.least_bound_bytes or peaks[0]])
        self.unit_bytes, self.unit = byte_unit(max(peaks))
        slack = 0.05 * ((max(peaks) - least) or max(peaks) or 1)
        left, right = max(0.0, least - slack), max(peaks) + slack
        self.axis.set_xlim(left / self.unit_bytes, right / self.unit_bytes)
        self.beyond = any(p.overhead > HIGHEST_TOP for p in points)
        highest = max([max(p.overhead, p.quartiles[1]) for p in points] + [LEAST_TOP])
        self.top = min(1.06 * highest, HIGHEST_TOP)
        low = min([min(p.overhead, p.quartiles[0]) for p in points] + [0.0])
        self.axis.set_ylim(100 * min(1.1 * low, -0.02 * self.top), 100 * self.top)

    def _bound(self) -> None:
        region = unreachable(self.comparison)
        if not region.tops:
            return
        tops = [100 * min(top, self.top) for top in region.tops]
        where = "below" if self.measured else "here"
        look = {"facecolor": PALE, "edgecolor": "#BBBBBB", "hatch": "///", "linewidth": 0.8}
        if self.measured:
            look = {"edgecolor": GREY, "linewidth": 1.0}
        self.axis.stairs(
            tops,
            [edge / self.unit_bytes for edge in region.edges_bytes],
            fill=not self.measured,
            label=f"no schedule {where}:\nproven for predicted times,\n{self._scope()}",
            zorder=1,
            **look,
        )

    def _scope(self) -> str:
        """In a few words, what the bounds cover: another order may be below them."""
        scopes = dict.fromkeys(bound.scope for bound in self.comparison.bounds)
        return "; ".join(_SHORT_SCOPES.get(scope, scope.words) for scope in scopes) or _EAGERS_ORDER

    def _curve(
        self,
        points: Sequence[Point],
        label: str,
        colour: str,
        marker: str,
        line: str,
        *,
        linewidth: float = 1.2,
        markersize: float = 7,
        zorder: float = 3,
    ) -> None:
        if not points:
            return
        inside = [p for p in points if p.overhead <= self.top]
        steps = inside if self.measured else staircase(inside)
        others = [p for p in inside if p not in steps]
        look = {"color": colour, "marker": marker, "markersize": markersize, "zorder": zorder}
        x = [p.peak_bytes / self.unit_bytes for p in steps]
        y = [100 * p.overhead for p in steps]
        last = max([p.peak_bytes / self.unit_bytes for p in inside], default=0.0)
        if x and last > x[-1]:
            x, y = [*x, last], [*y, y[-1]]
        self.axis.plot(
            x,
            y,
            drawstyle="steps-post",
            linestyle=line,
            linewidth=linewidth,
            markevery=list(range(len(steps))),  # no marker at the end of the line: no plan is there
            label=label,
            **look,
        )
        if others:
            x = [p.peak_bytes / self.unit_bytes for p in others]
            y = [100 * p.overhead for p in others]
            self.axis.plot(x, y, linestyle="none", label="_", **look)
        if self.measured:
            self._bars(inside, colour, zorder)
        self._at_the_edge(points, colour, zorder)

    def _peer(self, name: str, points: Sequence[Point], marker: str) -> None:
        inside = [p for p in points if p.overhead <= self.top]
        self.axis.plot(
            [p.peak_bytes / self.unit_bytes for p in inside],
            [100 * p.overhead for p in inside],
            marker=marker,
            linestyle="none",
            markerfacecolor="none",
            markeredgecolor=BLACK,
            markeredgewidth=1.4,
            markersize=8,
            label=self._peer_label(name),
            zorder=6,
        )
        self._bars(inside, BLACK, 5.5)
        self._at_the_edge(points, BLACK, 6)

    def _peer_label(self, name: str) -> str:
        """A peer's label, with a remark if it computes something other than eager."""
        steps = [r.measured for r in self.comparison.rows if (r.strategy, r.kind) == (name, "peer")]
        wrong = any(step is not None and step.bits == "WRONG" for step in steps)
        return f"{name} (peer{', WRONG results' if wrong else ''})"

    def _bars(self, points: Sequence[Point], colour: str, zorder: float) -> None:
        """The quartiles of measured overheads."""
        self.axis.vlines(
            [p.peak_bytes / self.unit_bytes for p in points],
            [100 * p.quartiles[0] for p in points],
            [100 * p.quartiles[1] for p in points],
            color=colour,
            linewidth=1,
            zorder=zorder,
        )

    def _at_the_edge(self, points: Sequence[Point], colour: str, zorder: float) -> None:
        """Arrows where points lie above the axis."""
        beyond = [p for p in points if p.overhead > self.top]
        if beyond:
            self.axis.plot(
                [p.peak_bytes / self.unit_bytes for p in beyond],
                [98.5 * self.top] * len(beyond),
                marker="$\\uparrow$",
                linestyle="none",
                color=colour,
                markersize=8,
                zorder=zorder,
                label="_",
            )

    def _unplanned(self) -> None:
        peak_bytes, overhead, words = self.base_bytes, 0.0, "nothing recomputed"
        eager = self.comparison.eager
        if self.measured and eager is not None:
            peak_bytes, words = eager.peak_bytes, "eager"
        elif self.measured:
            words = "nothing recomputed (predicted)"
        x = peak_bytes / self.unit_bytes
        self.axis.axvline(x, color=DARK, linestyle=(0, (1, 2)), linewidth=1.1, zorder=1.5)
        self.axis.plot(
            [x],
            [overhead],
            marker="*",
            markersize=12,
            color=BLACK,
            markeredgecolor="white",
            linestyle="none",
            label=f"{words}, {shown_bytes(peak_bytes)}",
            zorder=7,
        )

    def _axes(self) -> None:
        draw_grid(self.axis)
        kind = "measured" if self.measured else "predicted"
        self.axis.set_xlabel(f"{kind} peak memory of a step, {self.unit}")
        beyond = " (↑ more than that)" if self.beyond else ""
        self.axis.set_ylabel(f"{kind} extra time, %{beyond}")
        if self.base_bytes:
            share = 100 * self.unit_bytes / self.base_bytes
            twin = self.axis.secondary_xaxis(
                "top", functions=(lambda x: x * share, lambda x: x / share)
            )
            twin.set_xlabel("share of the unplanned peak, %")
            twin.spines["top"].set_visible(True)


def _style_of(chosen: Sequence[str]) -> list[tuple[str, str, str]]:
    """A look for each; the ranked strategies keep theirs from figure to figure."""
    fixed = {name: _LOOKS[i] for i, name in enumerate(RANKING[: len(_LOOKS)])}
    taken = {fixed[name] for name in chosen if name in fixed}
    free = [look for look in _LOOKS if look not in taken]
    return [fixed[name] if name in fixed else free.pop(0) for name in chosen]
