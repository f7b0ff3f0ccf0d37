from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planner import Plan, optimize
from planner.plots import plot_memory
from planner.plots.memory import beside
from solvers.schedule import Schedule
from tests.planner.small import Net

from .made import two_layers
from .test_memory_timeline import RECOMPUTING


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of three blocks at a budget that needs recomputation."""
    torch.manual_seed(0)
    sample = torch.randn(256, 32)
    free = optimize(Net(), sample, budget_gb=1)
    return optimize(Net(), sample, budget_bytes=int(0.8 * free.predicted_peak_bytes))


def test_areas_are_stacked_to_the_replay() -> None:
    """The uppermost outline is the memory of each run, over the time that it takes."""
    graph = two_layers()
    figure = plot_memory({"by hand": (graph, Schedule(RECOMPUTING))})
    values, edges, _ = figure.axes[0].patches[-1].get_data()
    assert list(values) == [21, 22, 25, 22, 22, 24, 23, 24, 26]
    assert list(edges) == [0, 5, 6, 11, 12, 13, 23, 28, 29, 39]
    assert figure.axes[0].get_title("left") == "by hand: peak 26\u00a0B, step 39 us"


def test_panels_share_axes_and_say_how_much_longer() -> None:
    """Each plan has a panel; the time is held against the first."""
    graph = two_layers()
    figure = plot_memory(
        {"unplanned": (graph, Schedule.keep_all(graph)), "other": (graph, Schedule(RECOMPUTING))},
        budget_bytes=30,
    )
    first, second = figure.axes
    assert second.get_title("left") == "other: peak 26\u00a0B, step 39 us (+21.9%)"
    assert first.get_xlim() == second.get_xlim() == (0, 39)
    assert first.get_ylim() == second.get_ylim()
    assert second.get_xlabel() == "time of the step by the cost model, us"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "budget, 30\u00a0B" in labels
    assert "inputs, outputs" not in labels  # there are none
    assert "saved for the backward" in labels


def test_a_plan_alone_is_beside_what_it_is_held_against(plan: Plan) -> None:
    """The step without recomputation and the recomputed blocks come before the plan."""
    assert list(beside(plan)) == ["nothing recomputed", "every block recomputed", "plan"]
    figure = plot_memory(plan, title="Net")
    assert len(figure.axes) == 3
    assert figure.get_suptitle().startswith("Net\n")
    assert "float32, roofline times" in figure.get_suptitle()
    budget_mb = plan.budget_bytes / 1e3
    lines = [line.get_ydata()[0] for line in figure.axes[2].lines]
    assert any(y == pytest.approx(budget_mb) for y in lines)


def test_nothing_to_draw_is_an_error() -> None:
    """No plans, no figure."""
    with pytest.raises(ValueError, match="there is no plan to draw"):
        plot_memory({})


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_files_are_the_same_each_time(tmp_path: Path, suffix: str) -> None:
    """Two drawings of a schedule are equal to the byte: no dates, no random names."""
    step = (two_layers(), Schedule(RECOMPUTING))
    for name in ("one", "two"):
        plot_memory({"by hand": step}, tmp_path / f"{name}{suffix}")
    one, two = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one) > 1000
