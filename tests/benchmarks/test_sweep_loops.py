"""The loop sweep: a sample of its loops, and that it sees what it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.sweeps.loop_run import Loop, drawn, run_loop, shrunk
from benchmarks.sweeps.loop_side import MOVES, LoopSide
from benchmarks.sweeps.loop_table import loop_table
from benchmarks.sweeps.verdicts import FINE

PLAIN = ("", "plain")


def test_a_loop_without_changes_has_equal_bits() -> None:
    """Nothing is said and nothing differs where nothing changes."""
    verdict = run_loop(Loop(model="perceptron", policy="error", acts=(PLAIN,)))
    assert (verdict.verdict, verdict.words) == ("equal", "")


def test_the_same_seed_draws_the_same_loop() -> None:
    """A loop that failed is found again by its number."""
    assert drawn(11) == drawn(11)
    assert len({drawn(seed) for seed in range(20)}) == 20


def test_other_bits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that happens in the planned side alone is a broken promise."""

    def only_planned(side: LoopSide) -> None:
        if side.planned:
            with torch.no_grad():
                next(side.model.parameters()).add_(1e-3)

    monkeypatch.setitem(MOVES, "spoil", only_planned)
    loop = Loop(model="perceptron", policy="error", acts=(("spoil", "plain"),))
    assert run_loop(loop).verdict == "other bits"


def test_a_loop_is_shrunk_to_what_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three changes the one that matters is left."""

    def crash(side: LoopSide) -> None:
        if side.planned:
            raise KeyError("of nobody")

    monkeypatch.setitem(MOVES, "crash", crash)
    acts = (("a parameter, in place", "plain"), PLAIN, ("crash", "plain"), PLAIN)
    loop = Loop(model="perceptron", policy="error", acts=acts)
    verdict = run_loop(loop)
    assert verdict.verdict == "crash"
    assert shrunk(loop, verdict)[0].acts == (("crash", "plain"),)


def test_an_error_of_the_planner_is_an_answer() -> None:
    """Another batch under the policy that raises ends the loop with the planner's words."""
    loop = Loop(model="perceptron", policy="error", acts=(("another batch", "plain"),))
    assert run_loop(loop).verdict == "error said"


def test_the_table_counts_verdicts() -> None:
    """Broken loops are counted by policy and listed with what was seen."""
    loop: dict[str, Any] = {"policy": "error"}
    records = [
        {"name": "seed 1", "outcome": "equal", "loop": loop},
        {
            "name": "seed 2",
            "outcome": "other bits",
            "loop": loop,
            "text": "t",
            "words": "w differs",
        },
    ]
    table = loop_table(records)
    assert "2 loops, 1 as promised" in table
    assert "| seed 2: t | other bits | w differs |" in table


HOLDING: list[tuple[str, str, str, str]] = [
    ("perceptron", "error", "a forward hook on a layer", "plain"),
    ("configured", "unplanned", "frozen layer", "plain"),
    ("configured", "replan", "another batch", "plain"),
    ("two heads", "error", "outputs that were not planned as differentiated", "plain"),
    ("two heads", "error", "", "a gradient penalty"),
    ("configured", "error", "", "an exception in the backward pass"),
    ("perceptron", "error", "a number", "plain"),
    ("perceptron", "unplanned", "a list's element", "plain"),
    ("configured", "replan", "a configuration's nested number", "plain"),
    ("convolutions", "unplanned", "batch norm's momentum", "plain"),
]


@pytest.mark.parametrize(("model", "policy", "move", "step"), HOLDING)
def test_a_sample_of_loops_keeps_the_promise(model: str, policy: str, move: str, step: str) -> None:
    """Equal bits, or a documented error, or a warning."""
    verdict = run_loop(Loop(model=model, policy=policy, acts=((move, step), PLAIN)))
    assert verdict.verdict in FINE, verdict
