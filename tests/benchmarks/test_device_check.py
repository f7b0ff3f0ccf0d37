"""The device check finds what it looks for, and says when there is nothing to compare."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks.device_check import __main__ as command
from benchmarks.device_check import bits, peers
from benchmarks.device_check import subjects as subjects_of
from benchmarks.device_check.bench import Bench
from benchmarks.device_check.bits import check_bits
from benchmarks.device_check.environment import (
    OWED,
    environment,
)
from benchmarks.device_check.memory import (
    Memory,
    check_planned,
    check_unplanned,
    worst_fragmentation,
)
from benchmarks.device_check.overhead import check_overhead, predicted_overhead
from benchmarks.device_check.peers import check_peers
from benchmarks.device_check.plan_without_device import plan_in_child
from benchmarks.device_check.portable import check_portable
from benchmarks.device_check.results import Failed, Results
from benchmarks.device_check.subjects import SUBJECTS, Size, Subject, subjects
from benchmarks.device_check.tables import markdown
from planner import Plan
from planner.comparing.peers import Peer, Ready, Situation

CPU = torch.device("cpu")

MEMORY = Memory(
    model="test", where=0.8, budget_bytes=1000, predicted_bytes=990, measured_bytes=1000
)


class Net(nn.Module):
    """Layers with dropout and batch norm, and a loss of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1))
            for _ in range(3)
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(x, labels)


def net(size: Size = "tiny") -> Subject:
    """A subject that takes no time."""

    def sample(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "x": torch.randn(256, 32, generator=generator),
            "labels": torch.randint(0, 32, (256,), generator=generator),
        }

    return Subject(
        name="net",
        size=size,
        words="3 layers",
        build=lambda: Net().train(),
        sample=sample,
        blocks=lambda model: list(model.layers),
        autocast=None,
    )


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Its plans are made once; every check leaves the model as it was."""
    return Bench(subject=net(), device=CPU, time_limit_s=2)


@pytest.mark.parametrize("where", [0.6, pytest.param("least", marks=pytest.mark.slow)])
def test_bits_are_equal(bench: Bench, where: float | str) -> None:
    """Eager is equal to itself and to the planned step, and the weights are put back."""
    before = {name: p.clone() for name, p in bench.model.named_parameters()}
    (row,) = check_bits(bench, where)
    assert (row.algorithms, row.eager_differs, row.planned_differs) == ("as they are", "", "")
    assert row.equal
    assert all(torch.equal(before[name], p) for name, p in bench.model.named_parameters())


def test_other_bits_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planned step that computes something else is reported with the first difference."""

    @contextlib.contextmanager
    def applied(self, plan):
        forward = self.model.forward
        self.model.__dict__["forward"] = lambda x, labels: forward(x, labels) * (1 + 1e-6)
        yield self.model
        del self.model.__dict__["forward"]

    monkeypatch.setattr(Bench, "applied", applied)
    monkeypatch.setattr(bits, "without_plan", lambda model: type(model).forward.__get__(model))
    (row,) = check_bits(bench, 0.6)
    assert row.eager_differs == ""
    assert row.planned_differs is not None
    assert "loss differs" in row.planned_differs
    assert "in step 1 of 3" in row.planned_differs


def test_an_eager_step_that_differs_from_itself_is_no_fault_of_a_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is tried again under deterministic algorithms, then left open."""
    seen: list[bool] = []
    true_step = bits._step

    def noisy(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        values = true_step(*args)
        values["loss"] = values["loss"] + len(seen)
        return values

    monkeypatch.setattr(bits, "_step", noisy)
    rows = check_bits(bench, 0.6)
    assert [row.algorithms for row in rows] == ["as they are", "deterministic"]
    assert all("loss differs" in row.eager_differs for row in rows)
    assert [row.planned_differs for row in rows] == [None, None]
    assert set(seen) == {False, True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert not Results(environment={}, bits=rows).faults()


def test_peaks_are_the_planner_s_own(bench: Bench) -> None:
    """Predicted is measured on the CPU, the budget holds, and nothing is reserved there."""
    unplanned, planned = check_unplanned(bench), check_planned(bench, "least")
    assert unplanned.error == pytest.approx(0, abs=0.01)
    assert planned.error == pytest.approx(0, abs=0.01)
    assert planned.within
    assert planned.measured_bytes < unplanned.measured_bytes
    assert planned.num_recomputed > 0
    assert planned.fragmentation is None
    assert worst_fragmentation([unplanned, planned]) is None


def test_a_budget_that_nothing_fits_is_a_row(bench: Bench) -> None:
    """It names the least feasible budget instead of a peak, and is no fault."""
    row = check_planned(bench, 0.1)
    assert "the least feasible is" in row.infeasible
    results = Results(environment=environment(CPU, {}), memory=[row])
    assert not results.faults()
    assert row.infeasible in markdown(results)


def test_fragmentation_is_the_worst_of_planned_steps() -> None:
    """Reserved over allocated, less one; the unplanned step does not count."""
    rows = [
        replace(MEMORY, where="unplanned", allocator_bytes=100, reserved_bytes=200),
        replace(MEMORY, allocator_bytes=100, reserved_bytes=105),
        replace(MEMORY, allocator_bytes=1000, reserved_bytes=1080),
    ]
    assert worst_fragmentation(rows) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (MEMORY, ""),
        (replace(MEMORY, measured_bytes=1001), "above the budget of 1000"),
        (replace(MEMORY, predicted_bytes=950), "(-5.00%)"),
        (replace(MEMORY, where="unplanned", budget_bytes=None, predicted_bytes=950), ""),
    ],
)
def test_memory_that_breaks_a_promise_is_a_fault(row: Memory, fault: str) -> None:
    """Above the budget, or more than 2 % off the prediction of a planned step."""
    faults = Results(environment={}, memory=[row]).faults()
    assert [fault in text for text in faults] == [True] * bool(fault)


def test_overheads_are_of_the_step_without_its_optimizer(bench: Bench) -> None:
    """Measured in pairs; predicted relative to a baseline that leaves the optimizer out."""
    row = check_overhead(bench, "least", priced_by=("roofline",), num_pairs=2)
    plan = bench.plan(row.budget_bytes)
    assert row.predicted == {"roofline": predicted_overhead(plan, bench.unplanned())}
    assert row.predicted["roofline"] > plan.overhead > 0
    assert row.predicted_step_us["roofline"] < plan.baseline_step_us
    assert row.num_pairs == 2
    assert row.planned_us > 0
    assert not math.isnan(row.measured)


def test_plans_of_two_steps_are_not_priced_by_each_other(bench: Bench) -> None:
    """Costs are only exchanged between plans of one fingerprint."""
    other = Bench(subject=replace(net(), optimizer="sgd"), device=CPU, time_limit_s=1)
    with pytest.raises(ValueError, match="plans of two steps"):
        predicted_overhead(bench.unplanned(), other.unplanned())


def test_a_plan_from_stand_ins_is_the_same(bench: Bench) -> None:
    """Made on ``meta`` and through JSON it has the fingerprint of the one made here."""
    row = check_portable(bench)
    assert row.same
    assert row.entry == "cpu"


@pytest.mark.slow
def test_a_peer_that_fails_leaves_its_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row says why, the rows of the others are there."""

    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler here\nlong story")

    monkeypatch.setattr(torch, "compile", refuse)
    rows = check_peers(bench, compile_budgets=(0.5,), num_pairs=2)
    assert [bool(row.error) for row in rows] == [False, False, False, True]
    assert rows[3].error == "RuntimeError: no compiler here"
    eager, checkpointing, plan, _ = rows
    assert eager.gradients == checkpointing.gradients == plan.gradients == "equal"
    assert eager.buffers == plan.buffers == "equal"
    assert checkpointing.buffers == "WRONG"  # statistics are taken twice
    assert plan.peak_bytes <= checkpointing.peak_bytes < eager.peak_bytes
    assert plan.ratio_to_checkpointing is not None


def test_a_peer_that_cannot_be_prepared_leaves_its_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing that refuses the model is a row, and the run goes on."""

    @contextlib.contextmanager
    def refuse(model: nn.Module, situation: Situation) -> Iterator[Ready]:
        raise ValueError("does not support it")
        yield

    broken = Peer(name="p", summary="", source="broken", prepare=refuse)
    monkeypatch.setattr(peers, "checkpointing_of", lambda model: broken)
    eager, checkpointing = check_peers(bench, compile_budgets=(), num_pairs=0)
    assert eager.error == ""
    assert checkpointing.error == "ValueError: does not support it"
    assert checkpointing.method == "per-block checkpointing, by broken"


@pytest.mark.slow
def test_a_run_without_a_card_says_what_is_owed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs on the CPU, in JSON and markdown, and says so on all sides."""
    monkeypatch.setitem(SUBJECTS, "net", net)
    options = ["--device", "cpu", "--size", "tiny", "--model", "net", "--pairs", "2"]
    checks = ["--check", "memory", "--check", "bits", "--check", "portable"]
    outcome = CliRunner().invoke(
        command.app,
        [*options, *checks, "--time-limit-s", "1", "--out", str(tmp_path)],
        catch_exceptions=False,
    )
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count("No GPU") == 2
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert data["circumstances"]["owed"] == OWED
    assert data["circumstances"]["versions"]["torch"] == torch.__version__
    assert data["circumstances"]["settings"]["seed"] == 0
    assert [row["where"] for row in data["memory"]] == ["unplanned", 0.8, 0.6, 0.4, "least"]
    assert data["headroom"] is None
    assert data["faults"] == []
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.startswith(f"**{OWED}**")
    assert "### Peak memory" in text


@pytest.mark.slow
def test_a_check_that_fails_is_a_fault_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit status is 1; what was found before and after is written."""

    def broken(bench):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(SUBJECTS, "net", net)
    monkeypatch.setattr(command, "check_unplanned", broken)
    options = ["--device", "cpu", "--model", "net", "--check", "memory", "--time-limit-s", "1"]
    outcome = CliRunner().invoke(command.app, [*options, "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert data["faults"] == ["net, memory unplanned: RuntimeError: out of memory"]
    assert len(data["memory"]) == 4


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    """A check that could not be timed leaves a file that every reader accepts."""
    results = Results(environment={"x": math.nan}, failed=[Failed(model="a", check="b", error="")])
    results.write(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["circumstances"] == {"x": None}


@pytest.mark.slow
def test_a_plan_for_a_card_is_made_in_a_process_that_sees_none(tmp_path: Path) -> None:
    """What the child writes is a plan for the device, and a child that fails says why."""
    plan_in_child(SUBJECTS["resnet50"]("tiny"), "h100", 0, tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").device_type == "cuda"
    with pytest.raises(RuntimeError, match="unknown device 'abacus'"):
        plan_in_child(SUBJECTS["resnet50"]("tiny"), "abacus", 0, tmp_path / "plan.json")


@pytest.mark.parametrize("size", ["full", "small", "tiny"])
def test_every_model_can_be_built_in_every_size(size: Size) -> None:
    """On ``meta``, with inputs that its signature takes and blocks to checkpoint."""
    for subject in subjects(size):
        with torch.device("meta"):
            model = subject.build()
        assert model.training
        assert subject.blocks(model)
        if size == "tiny":
            assert set(subject.sample(0)) <= set(model.forward.__annotations__)


def test_an_unknown_model_is_named() -> None:
    """The error lists what there is."""
    with pytest.raises(ValueError, match="unknown model bert; known are gpt2, llama, vit"):
        subjects_of.subjects("tiny", ("bert",))
