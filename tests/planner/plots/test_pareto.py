from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from matplotlib.figure import Figure

from planner.comparison_record import ComparisonRow
from planner.plots import plot_pareto

from .made import MB, bound, comparison, row, step, whole_comparison


def _lines(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Points by label."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]
        for line in figure.axes[0].lines
    }


def _labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def _close(points: list[tuple[float, float]]) -> Any:
    return [pytest.approx(p) for p in points]


def test_curves_are_at_their_figures() -> None:
    """Peaks in MB and overheads in per cent, ours as a curve; peers have no predictions."""
    lines = _lines(plot_pareto(whole_comparison()))
    assert lines["auto (ours)"] == _close([(40, 20), (60, 10)])
    assert lines["uniform_sqrt"] == _close([(60, 30)])
    assert lines["mine"] == _close([(70, 25)])
    assert not [label for label in lines if label.startswith("per block")]
    assert lines["nothing recomputed, 100\u00a0MB"] == _close([(100, 0)])
    assert "rotor" not in lines


def test_measured_figure_has_real_steps_only() -> None:
    """With measured=True a strategy stands where its real steps were, and has bars."""
    figure = plot_pareto(whole_comparison(), measured=True)
    lines = _lines(figure)
    assert lines["uniform_sqrt"] == _close([(61, 32)])
    assert lines["auto (ours)"] == _close([(40, 21)])
    assert lines["per block (peer)"] == _close([(50, 33)])
    assert "mine" not in lines
    bars = [
        tuple(float(y) for y in path.vertices[:, 1])
        for collection in figure.axes[0].collections
        for path in collection.get_paths()
    ]
    assert pytest.approx((31, 34)) in bars


def test_shaded_region_is_what_is_proven() -> None:
    """Steps end at the budgets; left of the least peak the region has no upper end."""
    figure = plot_pareto(whole_comparison())
    (region,) = figure.axes[0].patches
    values, edges, _ = region.get_data()
    top = figure.axes[0].get_ylim()[1]
    assert list(edges) == [0, 30, 40, 60]
    assert list(values) == pytest.approx([top, 19, 9])


def test_lines_claim_no_plan_between_those_there_are() -> None:
    """A plan serves every larger budget until the next one, which is below, does."""
    points = ((40, 0.4), (60, 0.1), (70, 0.3))
    figure = plot_pareto(comparison(*(row("mine", peak * MB, o) for peak, o in points)))
    curve, above = [line for line in figure.axes[0].lines if line.get_marker() == "s"]
    assert curve.get_drawstyle() == "steps-post"
    assert curve.get_xydata().tolist() == _close([(40, 40), (60, 10), (70, 10)])
    assert curve.get_markevery() == [0, 1]  # at 70 MB its plan is the one above
    assert above.get_xydata().tolist() == _close([(70, 30)])
    assert above.get_linestyle() == "None"


def test_noise_is_not_chosen_from() -> None:
    """Of real steps each plan is a step, also one that turned out slower."""
    rows = [
        row("mine", peak * MB, 0.1, measured=step(peak * MB, ratio))
        for peak, ratio in ((40, 1.2), (60, 0.9), (70, 1.1))
    ]
    lines = _lines(plot_pareto(comparison(*rows), measured=True))
    assert lines["mine"] == _close([(40, 20), (60, -10), (70, 10)])


def test_bars_are_within_the_axis() -> None:
    """The quartiles of a measured figure are seen whole."""
    wide = step(50 * MB, 1.2, quartiles=(0.9, 1.7))
    figure = plot_pareto(comparison(row("mine", 50 * MB, 0.2, measured=wide)), measured=True)
    low, high = figure.axes[0].get_ylim()
    assert low < -10
    assert high > 70


@pytest.mark.parametrize("measured", [False, True])
def test_the_region_says_what_it_is_proven_of(measured: bool) -> None:
    """An order of its own may get below the bounds, which speak of eager's."""
    labels = _labels(plot_pareto(whole_comparison(), measured=measured))
    (words,) = [label for label in labels if label.startswith("no schedule")]
    assert "proven for predicted times" in words
    assert "in eager's order" in words


@pytest.mark.parametrize("measured", [False, True])
def test_the_region_is_an_outline_beside_measured_figures(measured: bool) -> None:
    """A proof about predicted times rules no real step out."""
    (region,) = plot_pareto(whole_comparison(), measured=measured).axes[0].patches
    assert region.get_fill() is not measured


def test_no_point_of_a_schedule_is_shaded() -> None:
    """Each drawn point of a strategy lies outside the region."""
    figure = plot_pareto(whole_comparison())
    (region,) = figure.axes[0].patches
    path = region.get_path()
    for label, points in _lines(figure).items():
        for x, y in points:
            assert label == "_" or not path.contains_point((x + 1e-6, y + 1e-6))


def test_axes_say_units_and_share() -> None:
    """Memory in MB, its share of the unplanned peak, time in per cent, and what kind of figures."""
    figure = plot_pareto(whole_comparison())
    axis = figure.axes[0]
    assert axis.get_xlabel() == "predicted peak memory of a step, MB"
    assert axis.get_ylabel() == "predicted extra time, %"
    (twin,) = axis.child_axes
    assert twin.get_xlabel() == "share of the unplanned peak, %"
    low, high = axis.get_xlim()
    figure.draw_without_rendering()
    assert twin.get_xlim() == pytest.approx((low, high))  # 100 MB are 100 %
    assert figure.get_suptitle().splitlines() == [
        "Chain: peak memory against overhead",
        "predicted times (roofline) for a card, torch 2.13.0",
    ]


def test_a_measured_figure_names_no_cost_table() -> None:
    """Real steps have nothing of the device that times were predicted for."""
    figure = plot_pareto(replace(whole_comparison(), measured_on="a real card"), measured=True)
    assert figure.axes[0].get_ylabel() == "measured extra time, %"
    title = figure.get_suptitle()
    assert "measured on a real card" in title
    assert "predicted" not in title


def test_too_many_strategies_are_grey_together() -> None:
    """Eleven beside ours have looks of their own, the user's among them; the others share one."""
    rows = [row(f"user{i:02}", (40 + i) * MB, 0.5 - i / 100) for i in range(14)]
    figure = plot_pareto(comparison(row("auto", 40 * MB, 0.1), *rows))
    labels = _labels(figure)
    assert "3 others" in labels
    assert [name for name in labels if name.startswith("user")] == [
        f"user{i:02}" for i in range(11)
    ]
    looks = [
        (line.get_color(), line.get_marker(), line.get_linestyle())
        for line in figure.axes[0].lines
        if str(line.get_label()).startswith("user")
    ]
    assert len(set(looks)) == 11
    assert all(
        sum(a != b for a, b in zip(one, other)) >= 2
        for i, one in enumerate(looks)
        for other in looks[:i]
    )


def test_highlighted_are_as_asked() -> None:
    """Only those named are in colours."""
    labels = _labels(plot_pareto(whole_comparison(), highlight=["mine"]))
    assert "mine" in labels
    assert "uniform_sqrt" in labels  # the one grey curve is called by its name
    with pytest.raises(ValueError, match="no strategy 'yours' in this comparison; there are auto"):
        plot_pareto(whole_comparison(), highlight=["yours"])


def test_a_strategys_look_does_not_change_with_its_company() -> None:
    """What is well known looks the same in every figure."""

    def look(*others: str) -> tuple[Any, Any, Any]:
        rows = [row(name, (50 + i) * MB, 0.2) for i, name in enumerate((*others, "rotor"))]
        figure = plot_pareto(comparison(*rows))
        (line,) = [one for one in figure.axes[0].lines if one.get_label() == "rotor"]
        return line.get_color(), line.get_marker(), line.get_linestyle()

    assert look() == look("uniform_sqrt", "mine", "dtr")


def test_overheads_beyond_the_axis_are_arrows() -> None:
    """Three times the step's time does not flatten everything else."""
    figure = plot_pareto(comparison(row("auto", 40 * MB, 0.1), row("dtr", 40 * MB, 2.0)))
    axis = figure.axes[0]
    assert axis.get_ylim()[1] == pytest.approx(100)
    assert "more than that" in axis.get_ylabel()
    assert any(str(line.get_marker()) == "$\\uparrow$" for line in axis.lines)


def test_a_peer_with_wrong_results_says_so() -> None:
    """A tool that computes something else is not drawn like one that does not."""
    wrong = ComparisonRow(
        strategy="compiled", kind="peer", measured=step(50 * MB, 1.1, bits="WRONG")
    )
    labels = _labels(plot_pareto(comparison(wrong), measured=True))
    assert "compiled (peer, WRONG results)" in labels
    assert "nothing recomputed (predicted), 100\u00a0MB" in labels  # no eager step was measured


def test_nothing_to_draw_is_an_error() -> None:
    """A comparison in which everything failed is refused, and so is an odd suffix."""
    with pytest.raises(ValueError, match="none of 1 rows has a predicted peak"):
        plot_pareto(comparison(ComparisonRow(strategy="a", error="broken")))
    with pytest.raises(ValueError, match=r"written as .png or .svg, not as 'a.pdf'"):
        plot_pareto(whole_comparison(), "a.pdf")


def test_without_budgets_only_the_least_peak_is_shaded() -> None:
    """No bound, no steps."""
    figure = plot_pareto(comparison(row("none", 100 * MB, 0.0), bounds=(bound(40 * MB, None),)))
    (region,) = figure.axes[0].patches
    assert list(region.get_data().edges) == [0, 30]
