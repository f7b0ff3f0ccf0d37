from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.testing.zoo import ZOO
from graph_capture import capture
from graph_capture.cost_graph import CostGraph, Storage
from graph_capture.costs.library_workspace import STORAGE_NAME
from planner.plots.memory_timeline import (
    GRADIENTS,
    GROUPS,
    MODEL,
    RECOMPUTED,
    SAVED,
    TEMPORARIES,
    WORKSPACE,
    memory_timeline,
)
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, apply_strategy
from tests.solvers.graphs import random_order, random_step

from .made import two_layers


def _of(group: str, graph: CostGraph, order: tuple[int, ...]) -> list[int]:
    timeline = memory_timeline(graph, Schedule(order))
    return timeline.num_bytes[GROUPS.index(group)].tolist()


# mm0 relu0 mm1 relu1 | relu1 again, back1, mm0 again, relu0 again, back0
RECOMPUTING = (0, 1, 2, 3, 3, 4, 0, 1, 5)


def test_groups_are_as_counted_by_hand() -> None:
    """What each group holds during each run, with h1 saved and the rest run again."""
    graph = two_layers()
    assert _of(MODEL, graph, RECOMPUTING) == [10] * 9
    assert _of(SAVED, graph, RECOMPUTING) == [0, 0, 8, 8, 8, 8, 0, 0, 0]
    assert _of(TEMPORARIES, graph, RECOMPUTING) == [8, 12, 4, 4, 0, 0, 0, 0, 0]
    assert _of(RECOMPUTED, graph, RECOMPUTING) == [0, 0, 0, 0, 4, 4, 8, 12, 12]
    assert _of(GRADIENTS, graph, RECOMPUTING) == [0, 0, 0, 0, 0, 2, 2, 2, 4]
    assert _of(WORKSPACE, graph, RECOMPUTING) == [3, 0, 3, 0, 0, 0, 3, 0, 0]


def test_nothing_recomputed_is_all_saved() -> None:
    """In the step that keeps everything, what the backward reads is saved and nothing is a copy."""
    graph = two_layers()
    order = Schedule.keep_all(graph).order
    assert _of(SAVED, graph, order) == [8, 12, 20, 24, 24, 12]
    assert not any(_of(RECOMPUTED, graph, order))


def test_a_librarys_workspace_is_scratch() -> None:
    """It is filed under buffers, and is none of the model's; a real buffer is."""
    graph = two_layers()
    buffer = Storage(name="running_mean", size_bytes=5, producer=None, category="buffer")
    workspace = replace(buffer, name=STORAGE_NAME, size_bytes=100)
    more = CostGraph(graph.operators, (*graph.storages, buffer, workspace))
    order = Schedule.keep_all(graph).order
    assert _of(MODEL, more, order) == [15] * 6
    assert _of(WORKSPACE, more, order) == [103, 100, 103, 100, 100, 100]


def test_times_and_turn_are_as_counted_by_hand() -> None:
    """Runs begin when the ones before have ended; the backward begins with what runs for it."""
    timeline = memory_timeline(two_layers(), Schedule(RECOMPUTING))
    assert timeline.edges_us.tolist() == [0, 5, 6, 11, 12, 13, 23, 28, 29, 39]
    assert timeline.turn == 4
    assert timeline.turn_us == 12
    assert timeline.step_us == 39


@pytest.mark.parametrize("seed", range(20))
def test_groups_add_up_to_the_replay(seed: int) -> None:
    """On random graphs and orders the groups' sum is the judge's figure of every run."""
    graph = random_step(seed)
    schedule = Schedule(tuple(random_order(graph, seed)))
    timeline = memory_timeline(graph, schedule)
    outcome = replay(graph, schedule)
    assert tuple(timeline.total_bytes) == outcome.memory_bytes
    assert timeline.total_bytes.max() == timeline.peak_bytes == outcome.peak_bytes
    assert timeline.num_bytes.min() >= 0


@pytest.mark.parametrize("name", ["gpt2", "unet", "mlp_frozen", "mixture_of_experts"])
def test_peak_of_real_models_is_the_replays(name: str) -> None:
    """Of captured steps the highest sum is the replayed peak, to the byte."""
    case = ZOO[name]("tiny")
    graph = capture(case.make(), case.sample(0), loss_fn=case.loss_fn)
    for strategy in ("none", "chen_greedy"):
        outcome = apply_strategy(STRATEGIES[strategy], graph)
        timeline = memory_timeline(graph, outcome.schedule)
        assert timeline.total_bytes.max() == outcome.peak_bytes
        assert timeline.total_bytes[timeline.peak_run] == outcome.peak_bytes


def test_an_empty_step_has_an_empty_timeline() -> None:
    """A graph without operators is drawn as nothing, not as an error."""
    timeline = memory_timeline(CostGraph((), ()), Schedule(()))
    assert timeline.num_bytes.shape == (len(GROUPS), 0)
    assert timeline.turn == 0
    assert timeline.step_us == 0


def test_file_needs_neither_torch_nor_matplotlib() -> None:
    """The numbers come from the solvers' side alone."""
    from pathlib import Path

    from planner.plots import memory_timeline as module

    text = Path(module.__file__).read_text(encoding="utf-8")
    assert "torch" not in text
    assert "matplotlib" not in text
