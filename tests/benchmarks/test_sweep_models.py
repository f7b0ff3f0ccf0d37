"""The model sweep: its outcomes, its limits and its table."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sweeps.isolated import Limits, read_records, run_all, run_isolated
from benchmarks.sweeps.model_run import run_subject
from benchmarks.sweeps.model_table import model_table, refusal_class
from benchmarks.sweeps.subject import NotInstalled, Subject, mean_square, seeded
from benchmarks.sweeps.tiny_configs import VOCABULARY, WIDTH, tiny_config
from graph_capture.errors import CaptureError

SHORT = Limits(time_s=1.0)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Unsteady(Layers):
    """Computes something else each time, by a clock of its own."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Unsteady.calls += 1
        return super().forward(x) * Unsteady.calls


def rows(seed: int) -> tuple[Tensor]:
    return (torch.randn(64, 16, generator=seeded(seed)),)


def subject_of(model: type[nn.Module]) -> Subject:
    return Subject(make=lambda: model().train(), sample=rows, loss_fn=mean_square)


def test_a_model_whose_plan_holds_is_green() -> None:
    """Three layers train by a plan within its budget, as predicted."""
    record = run_subject(lambda: subject_of(Layers))
    assert record["outcome"] == "green", record
    assert record["planned_peak_bytes"] <= record["budget_bytes"]
    assert abs(record["planned_error"]) < 0.01


def test_other_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan whose application changes a weight by one bit is not green."""
    from planner import Plan

    apply = Plan.apply

    def spoiled(self: Plan, model: nn.Module, **options: Any) -> nn.Module:
        apply(self, model, **options)
        weight = next(model.parameters()).data.view(torch.int32)
        weight[0, 0] ^= 1
        return model

    monkeypatch.setattr(Plan, "apply", spoiled)
    assert run_subject(lambda: subject_of(Layers))["outcome"] == "other bits"


def test_what_the_planner_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CaptureError is a refusal, with its words."""
    import benchmarks.sweeps.model_run as model_run

    def refuse(*args: Any, **options: Any) -> None:
        raise CaptureError("the model could not be captured (at /m.py:3 in forward)")

    monkeypatch.setattr(model_run, "optimize", refuse)
    record = run_subject(lambda: subject_of(Layers))
    assert (record["outcome"], "could not be captured" in record["error"]) == ("refused", True)


def test_a_model_that_does_not_repeat_itself_is_not_judged() -> None:
    """Nothing can be said of bits that eager does not repeat."""
    assert run_subject(lambda: subject_of(Unsteady))["outcome"] == "not repeatable"


def test_a_missing_library_is_said() -> None:
    """A subject whose library is not installed is skipped by name."""

    def find() -> Subject:
        raise NotInstalled("diffusers is not installed")

    record = run_subject(find)
    assert record["outcome"] == "skipped"
    assert "diffusers" in record["error"]


def test_a_hanging_case_ends_at_its_limit() -> None:
    """A case that sleeps is ended and noted."""
    record = run_isolated(lambda: time.sleep(60) or {}, SHORT)
    assert record["outcome"] == "died"


def test_a_crashing_case_is_noted() -> None:
    """A case whose process is killed leaves a record with the signal."""
    import os
    import signal

    def crash() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    assert "SIGKILL" in run_isolated(crash, Limits(time_s=20))["error"]


def test_a_sweep_goes_on_where_it_stopped(tmp_path) -> None:
    """A case with a line in the file does not run again; a cut line does not count."""
    out = tmp_path / "sweep.jsonl"
    out.write_text('{"name": "a", "outcome": "green"}\n{"name": "b", "outc\n', encoding="utf-8")
    cases = [(name, lambda: {"outcome": "green"}) for name in "abc"]
    ran = [record["name"] for record in run_all(cases, out, Limits(time_s=20), limit_s=60)]
    assert ran == ["b", "c"]
    assert [record["name"] for record in read_records(out)] == ["a", "b", "c"]


def test_refusals_at_different_lines_are_one_class() -> None:
    """Numbers, places and names do not make another class."""
    first = refusal_class("CaptureError: 3 of 'x' (at /a/m.py:7 in forward) Write it so")
    assert first == refusal_class("CaptureError: 14 of 'y' (at /b/n.py:9 in forward) Other")


def test_the_table_counts_only_what_trains() -> None:
    """The share of planned models leaves out those that do not train in eager."""
    records = [
        {"name": "setups/a", "outcome": "refused", "error": "CaptureError: no"},
        {"name": "setups/b", "outcome": "no eager", "error": "ValueError: no"},
        {
            "name": "setups/c",
            "outcome": "green",
            "budget_bytes": 10,
            "planned_error": 0.0,
            "unplanned_error": 0.25,
            "branch_free": False,
        },
    ]
    table = model_table(records)
    assert "2 of 3 subjects train in eager; 1 of these are planned (50%)" in table
    assert "setups/c: +25.0%" in table


def test_a_configuration_becomes_tiny() -> None:
    """Widths, vocabularies and special tokens are small ones."""
    transformers = pytest.importorskip("transformers")
    config = tiny_config(transformers.Qwen2VLConfig)
    text = config.text_config
    assert (text.hidden_size, text.vocab_size) == (WIDTH, VOCABULARY)
    assert config.image_token_id < VOCABULARY


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["transformers/bert-generation", "transformers/convnext", "transformers/cohere", "setups/t5"],
)
def test_a_handful_of_models_is_green(name: str) -> None:
    """Architectures of the sweep whose plans hold."""
    pytest.importorskip("transformers")
    from benchmarks.sweeps.models import find

    record = run_subject(lambda: find(name))
    assert record["outcome"] == "green", record


@pytest.mark.slow
def test_a_recurrent_backward_pass_is_not_tried_on_made_up_memory() -> None:
    """Planning an LSTM over two layers runs in a process of its own and comes back.

    In a new process, because PyTorch computes no gradients in forks of one in which its threads
    have begun, and another test may have begun them.
    """
    code = (
        "from benchmarks.sweeps.isolated import Limits, run_isolated\n"
        "from benchmarks.sweeps.model_run import run_subject\n"
        "from benchmarks.sweeps.setups import SETUPS\n"
        "record = run_isolated(lambda: run_subject(SETUPS['LSTM']), Limits(time_s=100))\n"
        "assert record['outcome'] == 'green', record\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
