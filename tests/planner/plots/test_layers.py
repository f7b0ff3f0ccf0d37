from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from matplotlib.collections import PatchCollection

from benchmarks.testing.zoo import ZOO
from graph_capture import capture
from graph_capture.cost_graph import CostGraph
from planner.plots import plot_layers
from planner.plots.layer_table import Fate, layer_table
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, apply_strategy

from .made import two_layers
from .test_memory_timeline import RECOMPUTING

S, R, N = Fate.SAVED, Fate.RECOMPUTED, Fate.ABSENT


@cache
def _captured(name: str) -> CostGraph:
    case = ZOO[name]("tiny")
    return capture(case.make(), case.sample(0), loss_fn=case.loss_fn)


def test_fates_are_as_counted_by_hand() -> None:
    """h1 is saved; the others run once more, each output counted once."""
    table = layer_table(two_layers(), Schedule(RECOMPUTING))
    assert table.columns == ("layers.0", "layers.1")
    assert [str(row) for row in table.rows] == ["linear: mm", "relu"]
    assert table.fates.tolist() == [[R, S], [R, R]]
    assert table.saved_bytes.tolist() == [[0, 8], [0, 0]]
    assert table.recomputed_bytes.tolist() == [[8, 0], [4, 4]]


def test_a_third_run_and_a_saved_one_that_runs_again_are_told_apart() -> None:
    """Three runs are more than two; what is saved first and made again later is neither."""
    graph = two_layers()
    thrice = layer_table(graph, Schedule((0, 1, 2, 3, 3, 4, 0, 0, 1, 5)))
    assert thrice.fates[0, 0] == Fate.REPEATED
    # relu1's first output is read by back1; it then runs again for nothing.
    both = layer_table(graph, Schedule((0, 1, 2, 3, 4, 3, 5)))
    assert both.fates[1, 1] == Fate.BOTH
    assert both.saved_bytes[1, 1] == 4


def test_nothing_recomputed_is_saved_or_gone() -> None:
    """In the step that keeps everything nothing counts as recomputed."""
    graph = _captured("gpt2")
    table = layer_table(graph, Schedule.keep_all(graph))
    assert {Fate(f) for f in np.unique(table.fates)} <= {Fate.ABSENT, Fate.NOT_NEEDED, Fate.SAVED}
    assert not table.recomputed_bytes.any()


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("gpt2", ("before", "transformer.h.0", "transformer.h.1", "after")),
        ("bert", ("before", "bert.encoder.layer.0", "bert.encoder.layer.1", "after")),
        (
            "unet",
            ("down.0", "down.1", "down.2", "up.0", "merge.0", "up.1", "merge.1", "after"),
        ),
        ("lstm", ("embedding", "recurrent", "head")),
    ],
)
def test_columns_are_the_models_layers(name: str, columns: tuple[str, ...]) -> None:
    """Repeated blocks, stages of a CNN, or else the modules that there are; each operator once."""
    graph = _captured(name)
    outcome = apply_strategy(STRATEGIES["chen_greedy"], graph)
    table = layer_table(graph, outcome.schedule)
    assert table.columns == columns
    num_forward = sum(op.phase in ("forward", "loss") for op in graph.operators)
    assert (table.fates != Fate.ABSENT).sum() == num_forward


def test_equal_layers_fill_their_rows() -> None:
    """Operators of two equal blocks lie beside each other."""
    table = layer_table(graph := _captured("resnet50"), Schedule.keep_all(graph))
    relu = [str(row) for row in table.rows].index("layer.0.activation: relu")
    assert (table.fates[relu, 1:-1] != Fate.ABSENT).all()


def test_figure_has_a_box_for_each_operator_shown() -> None:
    """Boxes by fate, and the bytes of rows and columns as bars."""
    figure = plot_layers((two_layers(), Schedule(RECOMPUTING)))
    top, _, cells, side = figure.axes
    boxes = {
        str(c.get_label()): len(c.get_paths())
        for c in cells.collections
        if isinstance(c, PatchCollection)
    }
    assert boxes == {"saved": 1, "recomputed": 3}
    assert [tick.get_text() for tick in cells.get_yticklabels()] == ["linear: mm", "relu"]
    assert [tick.get_text() for tick in cells.get_xticklabels()] == ["0", "1"]
    assert cells.get_xlabel() == "layers: layers"
    assert [bar.get_height() for bar in top.patches] == [0, 8, 12, 4]
    assert [bar.get_width() for bar in side.patches] == [8, 0, 8, 8]
    assert side.get_xlabel() == "B in all layers"


def test_small_rows_are_left_out_and_counted() -> None:
    """What has next to no bytes is not shown unless it is asked for."""
    graph = _captured("gpt2")
    part = plot_layers((graph, Schedule.keep_all(graph)))
    whole = plot_layers((graph, Schedule.keep_all(graph)), small=True)
    num_part, num_whole = (len(f.axes[2].get_yticks()) for f in (part, whole))
    assert num_part < num_whole
    words = part.legends[0].get_title().get_text()
    assert words.startswith(f"{num_whole - num_part} kinds of operators")


def test_nothing_to_draw_is_an_error() -> None:
    """A graph without forward operators has no layers."""
    with pytest.raises(ValueError, match="none of 0 kinds of operators"):
        plot_layers((CostGraph((), ()), Schedule(())))
