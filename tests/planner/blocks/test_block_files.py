"""Block plans as files: read back the same, and trusted only after checks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from planner import BlockPlan, Plan, PlanError, measure
from planner.blocks.block_files import block_plan_from_dict
from tests.hostile import mutated

from .small_blocks import batch, small, small_plan


@cache
def _text() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        small_plan().save(path)
        return path.read_text()


def _data() -> dict[str, Any]:
    return json.loads(_text())


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    """The step, its parts, and which block has which."""
    path = tmp_path / "plan.json"
    small_plan().save(path)
    loaded = BlockPlan.load(path)
    assert (loaded.graph, loaded.schedule) == (small_plan().graph, small_plan().schedule)
    assert loaded.parts.plan_of == small_plan().parts.plan_of
    assert loaded.parts.whole == small_plan().parts.whole


def test_a_plan_from_a_file_trains_within_its_budget(tmp_path: Path) -> None:
    """Each block is captured and checked where it is applied."""
    path = tmp_path / "plan.json"
    path.write_text(_text())
    plan = BlockPlan.load(path)
    measured = measure(plan.apply(small()), batch(), repeats=0)
    assert measured.peak_bytes == plan.predicted_peak_bytes


def test_each_reader_names_the_other(tmp_path: Path) -> None:
    """A plan in blocks is none of a whole step, and the other way round."""
    path = tmp_path / "plan.json"
    path.write_text(_text())
    with pytest.raises(PlanError, match=r"read it with BlockPlan\.load"):
        Plan.load(path)
    path.write_text(json.dumps(_data()["step"]))
    with pytest.raises(PlanError, match=r"read it with Plan\.load"):
        BlockPlan.load(path)


def _another_plan(data: dict[str, Any]) -> None:
    data["blocks"]["layers.0"] = 7


def _another_path(data: dict[str, Any]) -> None:
    data["blocks"]["layers.9"] = data["blocks"].pop("layers.0")


def _another_schedule(data: dict[str, Any]) -> None:
    step = data["step"]
    names = [op["name"] for op in step["operators"]]
    inside = {v for v, name in enumerate(names) if name.startswith("layers.")}
    again = next(
        v for v in step["schedule"] if v not in inside and not step["operators"][v]["pinned"]
    )
    step["schedule"] = sorted({*range(len(names))} - {again}, key=lambda v: v)


def _another_cost(data: dict[str, Any]) -> None:
    at = next(op for op in data["step"]["operators"] if op["name"].startswith("layers."))
    at["cost_ns"] += 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("plans"), "'plans' is missing"),
        (lambda data: data.update(block_plan_version=2), "block_plan_version is 2"),
        (_another_plan, "'layers.0' has no plan 7"),
        (_another_path, "no operator 'layers.9/"),
        (_another_schedule, "at step"),
        (_another_cost, "at step|is another in the step"),
        (lambda data: data.update(measured=1), "at measured"),
        (lambda data: data.update(whole_step={"step_us": "x", "lower_bound_us": 0}), "whole_step"),
    ],
    ids=["key", "version", "index", "path", "schedule", "cost", "flag", "whole"],
)
def test_a_file_that_does_not_fit_itself_is_refused(
    change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    """The message says where."""
    data = _data()
    change(data)
    with pytest.raises(PlanError, match=words):
        block_plan_from_dict(data)


def test_a_schedule_of_another_block_is_refused() -> None:
    """Where the step runs a block otherwise than the block's own plan says."""
    data = _data()
    plans = data["plans"]
    order = plans[0]["schedule"]
    keep = sorted(set(order))
    assert order != keep, "the first plan repeats nothing"
    copied = copy.deepcopy(data)
    del copied["plans"][0]["schedule"][order.index(keep[-1])]
    with pytest.raises(PlanError):
        block_plan_from_dict(copied)


def test_damaged_files_are_refused_as_plans(tmp_path: Path) -> None:
    """Whatever was damaged, the answer is a plan or a ``PlanError``."""
    path = tmp_path / "plan.json"
    for content in mutated(_data(), 25, seed=1):
        path.write_bytes(content)
        try:
            BlockPlan.load(path)
        except PlanError:
            continue
