"""Levels of memory between the least and all, and which of them a budget ends at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from planner.base.solve_options import SolveOptions
from planner.compiled import inductor_rounds
from planner.compiled.inductor_rounds import WORTH_A_ROUND, Search
from planner.compiled.options import CompiledOptions
from planner.compiled.priced_step import price_step
from planner.planning.known_least import known_least_memory
from tests.planner.compiled.test_joint_step import joint_step_of

NUM_LEVELS = 31
SHARES = {"as expected": 1.0, "less than expected": 0.88, "more than expected": 1.04}
every_share = pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())


def _within(
    peaks: Sequence[int],
    usable_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    costs_ns: Sequence[int] = range(NUM_LEVELS, 0, -1),
    targets: Sequence[int] = range(1000, 1000 + 20 * NUM_LEVELS, 20),
    expected: Sequence[int] | None = None,
    least: int | None = 0,
    easy: int = 10**6,
) -> Any:
    """The level at which a search over levels of these peaks ends, and those it read."""
    search = object.__new__(Search)
    search._rounds, search._num_levels, search._base_cost_ns = 5, NUM_LEVELS, 0
    search._priced = SimpleNamespace(graph=None)  # type: ignore[assignment]
    search._solving = SolveOptions()
    read: list[int] = []

    def at(level: int) -> Any:
        read.append(level)
        return SimpleNamespace(needed_bytes=peaks[level], cost_ns=costs_ns[level], level=level)

    monkeypatch.setattr(search, "_at", at)
    monkeypatch.setattr(search, "_target_bytes", targets.__getitem__)
    monkeypatch.setattr(search, "_expected_bytes", (expected or targets).__getitem__)
    monkeypatch.setattr(search, "_solved", lambda level: SimpleNamespace(cost_ns=costs_ns[level]))
    monkeypatch.setattr(inductor_rounds, "fits_easily", lambda _, num_bytes: num_bytes >= easy)
    if least is not None:
        known = SimpleNamespace(peak_bytes=least)
        monkeypatch.setattr(inductor_rounds, "known_least_memory", lambda *_: known)
    found = search.within(usable_bytes)
    return (None if found is None else found.level), list(dict.fromkeys(read))


@every_share
def test_level_never_falls_when_the_budget_rises(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where codes take one share of what is expected of them, whichever it is."""
    peaks = [round(share * (1000 + 20 * level)) for level in range(NUM_LEVELS)]
    ends = [_within(peaks, usable, monkeypatch)[0] for usable in range(850, 1800, 7)]
    levels = [-1 if end is None else end for end in ends]
    assert levels == sorted(levels)
    assert levels[-1] > 20


@every_share
def test_what_is_found_fits_and_leaves_little(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steady levels it is the highest that fits, or one within 5 % of the budget."""
    peaks = [round(share * (1000 + 20 * level)) for level in range(NUM_LEVELS)]
    for usable in range(peaks[0], peaks[-1], 7):
        level, read = _within(peaks, usable, monkeypatch)
        highest = max(level for level in range(NUM_LEVELS) if peaks[level] <= usable)
        assert peaks[level] <= usable
        assert level == highest or usable - peaks[level] <= WORTH_A_ROUND * usable
        assert len(read) <= 6


def test_what_is_found_fits_where_codes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the code of a higher level takes less than that of a lower one."""
    draw = random.Random(0)
    for _ in range(50):
        peaks = [1000 + 20 * level + draw.randint(-60, 60) for level in range(NUM_LEVELS)]
        for usable in range(950, 1800, 7):
            level, _read = _within(peaks, usable, monkeypatch)
            lowest = min(peaks[:3])
            assert level is not None or lowest > usable
            assert level is None or peaks[level] <= usable


def test_the_lowest_levels_are_read_before_a_budget_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what an error names does not depend on the budget."""
    peaks = [1000 + 20 * level for level in range(NUM_LEVELS)]
    for usable in (1, 500, 800, 999):
        found, read = _within(peaks, usable, monkeypatch)
        assert found is None
        assert {0, 1, 2} <= set(read)


def test_levels_where_the_solver_finds_little_hide_no_better_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On T5 the two lowest repeat nearly everything, and their code takes more than the third's."""
    costs_ns = [388, 388, *range(110, 110 - NUM_LEVELS + 2, -1)]
    targets = range(1777, 1777 + 17 * NUM_LEVELS, 17)
    for third, ends in ((1875, {1812: None, 1813: 2, 1874: 2}), (1950, {1949: 2})):
        peaks = [1947, 1947, 1813, *(third + 5 * level for level in range(NUM_LEVELS - 3))]
        for usable, end in ends.items():
            assert _within(peaks, usable, monkeypatch, costs_ns, targets)[0] == end


def test_one_reading_does_where_codes_take_what_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However far that is below the levels' own memory."""
    targets = [1000 + 200 * level for level in range(NUM_LEVELS)]
    peaks = [round(0.9 * target) for target in targets]
    for usable in range(1800, 6000, 37):
        level, read = _within(peaks, usable, monkeypatch, targets=targets, expected=peaks)
        assert read == [level]
        assert level == max(level for level in range(NUM_LEVELS) if peaks[level] <= usable)


def test_one_reading_does_near_the_least_where_codes_take_what_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cheaper level is not read that was not expected to fit, as the code read bears that out."""
    targets = [1000 + 40 * level for level in range(NUM_LEVELS)]
    for lowest in range(3):
        usable = targets[lowest] + 10
        assert _within(targets, usable, monkeypatch, targets=targets) == (lowest, [lowest])


def test_two_readings_do_where_codes_take_less_than_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first says how much less."""
    targets = [1000 + 200 * level for level in range(NUM_LEVELS)]
    peaks = [round(0.9 * target) for target in targets]
    for usable in range(1800, 6500, 37):
        level, read = _within(peaks, usable, monkeypatch, targets=targets)
        assert len(read) <= 3
        highest = max(level for level in range(NUM_LEVELS) if peaks[level] <= usable)
        assert level == highest or usable - peaks[level] <= WORTH_A_ROUND * usable


def test_levels_that_are_farther_off_than_ever_seen_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Code that takes half as much again as its level is found not to fit, and a lower one is."""
    targets = [1000 + 200 * level for level in range(NUM_LEVELS)]
    peaks = [target * 3 // 2 for target in targets]
    for usable in range(1500, 6500, 37):
        level, _ = _within(peaks, usable, monkeypatch, targets=targets)
        assert level is not None
        assert peaks[level] <= usable


def test_levels_below_the_least_memory_are_solved_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second one, for which what was found for the first is no start within its memory."""

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = (x @ weight).sin().exp().cos()
        return x.sum()

    inputs = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    step = joint_step_of(loss, *inputs)
    priced = price_step(step)
    search = Search(priced, CompiledOptions.of({"budget_gb": 1}), "a name of this test", never)
    least_bytes = known_least_memory(priced.graph, 0).peak_bytes
    monkeypatch.setattr(search, "_target_bytes", lambda level: least_bytes - 300 + 100 * level)
    for level in range(2):
        assert search._solved(level).peak_bytes == least_bytes


def never(*_: Any) -> Any:
    """What is not to be called."""
    raise AssertionError


def test_least_memory_is_asked_for_near_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds; where uniform segments fit well below a level, nobody needs it."""
    targets = [1000 + 100 * level for level in range(NUM_LEVELS)]

    monkeypatch.setattr(inductor_rounds, "known_least_memory", never)
    level, _ = _within(targets, 2500, monkeypatch, targets=targets, easy=1800, least=None)
    assert targets[level] <= 2500


def test_levels_below_the_least_memory_are_not_the_lowest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lowest are those from the last one that the least memory takes the place of."""
    targets = [1000 + 100 * level for level in range(NUM_LEVELS)]
    peaks = [max(target, 1450) for target in targets]
    found, read = _within(peaks, 1400, monkeypatch, targets=targets, least=1450)
    assert found is None
    assert {4, 5, 6, 7} <= set(read)
