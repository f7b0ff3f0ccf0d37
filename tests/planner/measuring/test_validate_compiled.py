"""Plans that are compiled, held to their word: peak, results up to rounding, what is said."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from planner import Plan, PlanError, Validation, applied_plan, optimize
from planner.base.training_step import train_step
from planner.cli.app import app
from planner.compiled import planned_code
from planner.compiled.compiled_stretch import ReadStretch
from planner.measuring.bit_comparison import Results, Verdict
from planner.measuring.rounding import compare_rounded
from planner.running.compiled_calls import CompiledCalls
from tests.planner.blocks.small_blocks import batch, small, small_plan
from tests.planner.compiled.test_planned_code import EagerStretches, Tanhs, tanhs_plan
from tests.planner.small import make, sample

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
    reason="Inductor needs a C++ compiler",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TARGET = f"{__name__}:target"


def target() -> tuple[nn.Module, Tensor]:
    """What the command validates."""
    return make(Tanhs), sample()


class ScaledStretches(EagerStretches):
    """Stretches whose results are all multiplied."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def compiled(self, read: ReadStretch) -> Any:
        """The calls themselves, and then the factor."""
        run = super().compiled(read)
        return lambda boxed: [t.mul_(self._factor) for t in run(boxed)]


def validated(
    monkeypatch: pytest.MonkeyPatch, stretches: EagerStretches, **options: Any
) -> Validation:
    """A trial in which nothing is compiled, but everything else is as if it were.

    These stretches free nothing, so the budget is not theirs.
    """
    monkeypatch.setattr(planned_code, "StretchCompiler", lambda: stretches)
    options = {"repeats": 0, "compile": True, **options}
    found = tanhs_plan().validate(make(Tanhs), sample(), **options)
    return replace(found, budget_bytes=int(found.peak.measured))


def test_equal_bits_are_called_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches that run eager's calls leave eager's bits; what was compiled is said."""
    found = validated(monkeypatch, EagerStretches())
    assert (found.bits, found.gradient_error) == ("equal", 0.0)
    assert found.as_promised
    assert found.compiled is not None
    assert found.compiled.compiled > 0
    assert f"compiled  {found.compiled}" in str(found)
    assert "of eager calls" in str(found)
    said = json.loads(json.dumps(found.to_dict()))
    assert said["compiled"]["compiled_calls"] == found.compiled.compiled
    assert said["compiled"]["peak_bytes"] == found.compiled.peak_bytes


def test_rounding_is_right_and_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bits within the tolerance are as promised, and the largest error is shown."""
    found = validated(monkeypatch, ScaledStretches(1 + 1e-6))
    assert found.bits == "right"
    assert found.as_promised
    assert found.gradient_error is not None
    assert found.tolerance is not None
    assert 0 < found.gradient_error < found.tolerance
    assert f"gradients within {found.gradient_error:.1e} of their norms" in str(found)


def test_wrong_results_are_not_as_promised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beyond rounding a step is wrong, in the first line and by the exit status."""
    found = validated(monkeypatch, ScaledStretches(1.1))
    assert found.bits == "WRONG"
    assert not found.as_promised
    assert found.within_budget
    assert str(found).startswith("WRONG RESULTS: with the compiled plan the ")
    path, asked = tmp_path / "plan.json", []
    tanhs_plan().save(path)
    monkeypatch.setattr(Plan, "validate", lambda *_, **how: asked.append(how["compile"]) or found)
    for options, wanted in (["--compile"], True), ([], False):
        done = CliRunner().invoke(app, ["validate", str(path), TARGET, *options])
        assert done.exit_code == 4, done.output
        assert done.stdout.startswith("WRONG RESULTS: ")
        assert asked.pop() is wanted


def test_nothing_stays_applied_or_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is applied without the compiler runs on without it."""
    model = tanhs_plan().apply(make(Tanhs))
    monkeypatch.setattr(planned_code, "StretchCompiler", EagerStretches)
    tanhs_plan().validate(model, sample(), repeats=0, bits=False, compile=True)
    train_step(model, sample())
    applied = applied_plan(model)
    assert applied is not None
    assert applied.compiled is None
    assert applied.planned_steps == 1


def test_without_compiling_bits_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a compiled trial are its own."""
    found = validated(monkeypatch, EagerStretches(), compile=False)
    assert (found.bits, found.compiled, found.gradient_error) == ("equal", None, None)
    assert found.peak.predicted == tanhs_plan().predicted_peak_bytes


def test_the_peak_is_that_of_code_and_of_calls_between() -> None:
    """By hand: runs that are compiled altogether count by what was read of their code."""
    plan = tanhs_plan()
    memory = plan.replay.memory_bytes
    highest = frozenset(run for run, n in enumerate(memory) if n == max(memory))
    rest = max(n for run, n in enumerate(memory) if run not in highest)
    assert rest < max(memory)
    nothing = CompiledCalls()
    assert nothing.step_peak_bytes(plan) == plan.predicted_peak_bytes
    assert CompiledCalls(runs=highest, peak_bytes=rest - 1).step_peak_bytes(plan) == rest
    found = CompiledCalls(runs=highest, peak_bytes=rest - 1) + CompiledCalls(peak_bytes=rest + 1)
    assert found.step_peak_bytes(plan) == rest + 1


def results(state: int, gradient: float) -> Results:
    """What a step left."""
    return {
        "the loss": torch.tensor(1.0),
        "the gradient of weight": torch.tensor([gradient, 1.0]),
        "the random generator": torch.tensor([state], dtype=torch.uint8),
    }


def judged(*runs: Results, second: Results) -> Verdict:
    """The verdict on a step, when eager's leaves one after the other of these."""
    eager = iter(runs)
    return compare_rounded(
        nn.Linear(1, 1), torch.device("cpu"), lambda: next(eager), lambda: second
    )


def test_the_generators_state_may_not_differ() -> None:
    """Whatever gradients are."""
    found = judged(results(1, 1.0), results(1, 1.0), second=results(2, 1.0))
    assert found.bits == "WRONG"
    assert found.difference == "the random generator ends in another state"


def test_steps_that_do_not_repeat_themselves_judge_no_others() -> None:
    """Two eager steps that are as far apart say nothing of a third."""
    found = judged(results(1, 1.0), results(1, 2.0), second=results(1, 3.0))
    assert found.bits == "not repeatable"


def test_other_devices_are_refused() -> None:
    """A plan for a card is refused before anything runs, with the other way to compile."""
    model, x = make(Tanhs), sample()
    plan = optimize(model, x, budget_gb=1, device="h100")
    with pytest.raises(PlanError, match=r'plan for the CPU.*backend="remat"'):
        plan.validate(model, x, compile=True)


@needs_compiler
@pytest.mark.slow
def test_inductors_code_is_predicted_and_right(tmp_path: Path) -> None:
    """From the shell, by a plan file: within the budget, as read, and up to rounding."""
    path = tmp_path / "plan.json"
    tanhs_plan().save(path)
    options = ["--compile", "--repeats=0", "--json"]
    done = CliRunner().invoke(app, ["validate", str(path), TARGET, *options])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["within_budget"]
    assert said["bits"] in ("equal", "right")
    assert said["gradient_error"] <= said["tolerance"]
    assert said["compiled"]["stretches"] > 0
    assert abs(said["peak"]["error"]) < 0.001


@needs_compiler
@pytest.mark.slow
def test_blocks_that_are_compiled_are_predicted_and_right() -> None:
    """The peak of the whole step follows the code of the blocks."""
    plan = small_plan()
    found = plan.validate(small(), batch(), repeats=0, compile=True)
    assert found.as_promised
    assert found.bits in ("equal", "right")
    assert found.compiled is not None
    assert found.compiled.stretches >= len(plan.blocks)
    assert abs(found.peak.error) < 0.001
    assert sum(f.predicted for f in found.at_peak) == found.peak.predicted
