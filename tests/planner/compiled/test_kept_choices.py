"""Choices that the next process takes again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch.fx import GraphModule

from planner import PlanWarning
from planner.base.budget import Budget
from planner.compiled import choose as choosing
from planner.compiled import kept_choices
from planner.compiled.fused_groups import fuse
from planner.compiled.kept_choices import Choice, keep_choice, place_of, read_choice
from planner.compiled.options import CompiledOptions
from planner.compiled.priced_step import PricedStep, price_step, unplanned_peak_bytes
from solvers.result import SolveStatus
from solvers.schedule import Schedule
from tests.planner.compiled.test_joint_step import joint_step_of


@pytest.fixture(scope="module")
def priced() -> PricedStep:
    """A chain of products, each of which is wanted again."""

    def loss(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        for weight in weights:
            x = (x @ weight).sin()
        return x.sum()

    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    step = joint_step_of(loss, torch.randn(256, 32), weights)
    fused = fuse(step)
    return price_step(step, groups=fused.groups, inner=fused.inner, replays_draws=False)


def _choice(priced: PricedStep) -> Choice:
    return Choice(
        schedule=Schedule.keep_all(priced.graph),
        peak_bytes=900,
        unplanned_peak_bytes=1000,
        lower_bound_ns=5,
        status=SolveStatus.FEASIBLE,
    )


@pytest.mark.parametrize("has_schedule", [True, False])
def test_what_is_kept_is_read(priced: PricedStep, tmp_path: Path, has_schedule: bool) -> None:
    """With a schedule, and of PyTorch's own partition, which has none."""
    choice = _choice(priced) if has_schedule else replace(_choice(priced), schedule=None)
    keep_choice(tmp_path / "a" / "b.json", choice)
    assert read_choice(tmp_path / "a" / "b.json", priced.graph, 900) == choice


def test_nothing_is_read_where_nothing_is_kept(priced: PricedStep, tmp_path: Path) -> None:
    """Without a word: a first process is no mistake."""
    assert read_choice(tmp_path / "none.json", priced.graph, 900) is None


DAMAGE: dict[str, Any] = {
    "schedule": [[], [0, 10**9], [0.5], ["0"], "0", [[]], {}],
    "peak_bytes": [-1, 1.5, True, None, "9", 901],
    "lower_bound_ns": [-1, None],
    "status": ["best", None, []],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in DAMAGE.items() for value in values]
)
def test_a_damaged_file_is_said_and_not_used(
    priced: PricedStep, tmp_path: Path, name: str, value: object
) -> None:
    """Whatever it says instead; the last peak is above the budget."""
    path = tmp_path / "choice.json"
    path.write_text(json.dumps({**json.loads(_choice(priced).to_json()), name: value}))
    with pytest.warns(PlanWarning, match=r"choice\.json cannot be used .* the plan is made again"):
        assert read_choice(path, priced.graph, 900) is None


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"a": 1e999}'])
def test_a_file_of_something_else_is_said_and_not_used(
    priced: PricedStep, tmp_path: Path, content: bytes
) -> None:
    """None of them is an error."""
    path = tmp_path / "choice.json"
    path.write_bytes(content)
    with pytest.warns(PlanWarning, match="cannot be used"):
        assert read_choice(path, priced.graph, 900) is None


def test_a_folder_that_cannot_be_written_is_said(priced: PricedStep, tmp_path: Path) -> None:
    """Planning goes on."""
    (tmp_path / "file").touch()
    with pytest.warns(PlanWarning, match=r"cannot be written .* the next process plans again"):
        keep_choice(tmp_path / "file" / "choice.json", _choice(priced))


def test_places_differ_by_all_that_a_choice_depends_on() -> None:
    """And are the same for the same."""
    search = CompiledOptions.of({"budget_gb": 1}).solving
    asked = [("graph", 100, search), ("graph", 101, search), ("other", 100, search)]
    asked.append(("graph", 100, replace(search, seed=search.seed + 1)))
    assert len({place_of(*told) for told in asked}) == 4
    assert place_of(*asked[0]) == place_of("graph", 100, replace(search))


def test_no_place_where_inductor_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is off, so ours is."""
    monkeypatch.setattr(kept_choices, "inductor_cache_folder", lambda: None)
    assert place_of("graph", 100) is None


def _never(*_args: object, **_named: object) -> NoReturn:
    raise AssertionError("it was asked for")


@pytest.mark.filterwarnings("ignore:the code that Inductor generates is read back on the CPU only")
def test_a_choice_is_made_once(priced: PricedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is solved, and the same graphs come out."""
    monkeypatch.setattr(choosing, "can_be_read", lambda device: False)
    budget = Budget(total_bytes=int(0.8 * unplanned_peak_bytes(priced)), headroom_bytes=0)
    options = CompiledOptions.of({"budget_bytes": budget.total_bytes})
    first = choosing.choose(priced, budget, options, _never)
    monkeypatch.setattr(choosing, "solve_step", _never)
    again = choosing.choose(priced, budget, options, _never)
    other = replace(budget, total_bytes=budget.total_bytes - 1)
    with pytest.raises(AssertionError, match="it was asked for"):
        choosing.choose(priced, other, options, _never)
    assert first.choice.schedule is not None
    assert first.choice.schedule.recomputed()
    assert again.choice == first.choice
    assert [_text(part) for part in (again.forward, again.backward)] == [
        _text(part) for part in (first.forward, first.backward)
    ]


def _text(module: GraphModule) -> str:
    return str(module.graph)


def test_an_own_partition_is_not_read_again(
    priced: PricedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it fits, a budget above all costs nothing the second time but making it."""
    keep = Schedule.keep_all(priced.graph)
    made = choosing.emit_held(priced, keep)
    monkeypatch.setattr(choosing, "lowered_extra_bytes", lambda *_, **__: 1000)
    budget = Budget(total_bytes=10**9, headroom_bytes=0)
    options = CompiledOptions.of({"budget_gb": 1})
    first = choosing.choose(priced, budget, options, lambda: made)
    monkeypatch.setattr(choosing, "peak_of", _never)
    again = choosing.choose(priced, budget, options, lambda: made)
    assert first.choice == again.choice
    assert again.choice.schedule is None


PROCESS = """
import torch
from tests.planner.compiled.models import compiled, model_and_sample, step

torch.set_num_threads(1)

class Made(Exception):
    pass

def on_plan(plan):
    print(plan.solve_s, plan.predicted_peak_bytes, hash(plan.schedule), plan.lower_bound_ns)
    raise Made

model, x = model_and_sample()
call, _ = compiled(model, lower="inductor", budget_bytes=500_000, on_plan=on_plan)
try:
    step(model, call, x)
except Exception as error:
    assert "Made" in str(error), error
"""


@pytest.mark.slow
def test_the_next_process_finds_it(tmp_path: Path) -> None:
    """The graph has the same name there, whatever the seed of hashes is."""
    told = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": seed},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        told.append(done.stdout.split())
    assert float(told[0][0]) > 0
    assert float(told[1][0]) == 0
    assert told[0][1:] == told[1][1:]
