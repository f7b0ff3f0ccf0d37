"""Shapes, cases and workers of the benchmark of deep models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.plan_runs import planned
from benchmarks.plan_worker import Job, from_json, to_json, work
from benchmarks.scale import DEEP, SUITE, app, blocks_table, parse_case, table
from benchmarks.shapes import SHAPES, build, num_parameters

pytest.importorskip("transformers")

NARROW: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 4, "vocab_size": 101, "bos_token_id": 0, "eos_token_id": 0},
    "llama-70b": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
    },
}


def narrow(model: str = "gpt2", **more: Any) -> Job:
    """A job on two narrow layers."""
    settings = {"batch": 2, "sequence": 64, "layers": 2, "options": NARROW[model], "limit_s": 5.0}
    return Job(model=model, **{**settings, **more})


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-70b", 69.0), ("gpt3-175b", 174.6), ("gpt2", 0.1244), ("gpt2-xl", 1.5576)],
)
def test_shapes_have_their_published_size(name: str, billions: float) -> None:
    """Parameters of the whole model, to the last digit given: 68.98, 174.6, 0.124, 1.558."""
    model, sample = build(name, batch=1, sequence=1024)
    assert num_parameters(model) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert all(t.is_meta for t in (*model.parameters(), *sample.values()))


def test_sequences_beyond_the_published_ones_have_positions() -> None:
    """GPT-2 knows 1,024 positions; a longer sample gets a longer table."""
    model, sample = build("gpt2", batch=1, sequence=1500, layers=1)
    assert model.get_parameter("transformer.wpe.weight").shape[0] == 1500
    assert sample["input_ids"].shape == (1, 1500)


def test_cases_are_read() -> None:
    """A case says model, sequence and batch; those that run by default are all known."""
    job = parse_case("gpt3-175b:4096x2", "autocast")
    assert (job.model, job.sequence, job.batch) == ("gpt3-175b", 4096, 2)
    assert (job.weights, job.autocast) == ("float32", "bfloat16")
    assert {parse_case(case).model for case in (*DEEP, *SUITE)} <= SHAPES.keys()
    for wrong in ("gpt5:1x1", "gpt2:1", "gpt2:ax1", "gpt2:64x0"):
        with pytest.raises(typer.BadParameter, match="is not MODEL:SEQUENCExBATCH"):
            parse_case(wrong)
    with pytest.raises(typer.BadParameter, match="numbers are one of"):
        parse_case("gpt2:64x1", "int4")


def test_jobs_travel_as_json() -> None:
    """A worker reads what was sent."""
    job = narrow(survey=True, budgets_bytes=(5, 7))
    assert from_json(to_json(job)) == job


@pytest.mark.slow
def test_surveys_and_plans() -> None:
    """Half-way between the least peak and keep-all a plan fits, below the least peak none does."""
    job = narrow("llama-70b", weights="bfloat16", batch=8, optimizer="sgd")
    (first,) = work(narrow("llama-70b", weights="bfloat16", batch=8, optimizer="sgd", survey=True))
    sizes = first["survey"]
    assert sizes["resident_bytes"] < sizes["least_bytes"] < sizes["keep_all_bytes"]
    budget = (sizes["least_bytes"] + sizes["keep_all_bytes"]) // 2
    too_low = sizes["least_bound_bytes"] - 1
    job = narrow(
        "llama-70b",
        weights="bfloat16",
        batch=8,
        optimizer="sgd",
        budgets_bytes=(budget, too_low),
    )
    fits, fails = (result["plan"] for result in work(job))
    assert fits["peak_bytes"] <= budget
    assert fits["overhead"] > 0
    assert 0 <= fits["gap"] < 0.02
    assert fits["file_bytes"] > 1000
    assert fails["status"] == "infeasible"
    assert fails["min_budget_bytes"] > too_low
    assert fits["max_rss_bytes"] > 100e6


@pytest.mark.slow
def test_without_logits_in_hand_less_is_needed() -> None:
    """A model that hands out its loss alone lets the step free its logits."""
    peaks = [
        next(work(narrow(batch=64, optimizer=None, survey=True, loss_only=loss_only)))["survey"]
        for loss_only in (False, True)
    ]
    assert peaks[1]["least_bytes"] < peaks[0]["least_bytes"]
    assert peaks[1]["num_parameters"] == peaks[0]["num_parameters"]


@pytest.mark.slow
def test_a_worker_that_fails_is_an_error() -> None:
    """What a worker dies of is in the result, once for each budget that it left open."""
    results = planned(Job(model="gpt5", batch=1, sequence=1, budgets_bytes=(1, 2)))
    assert len(results) == 2
    assert "unknown model 'gpt5'" in results[0]["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["deep", "gpt2:128x4", "--share", "0.5", "--layers", "2"],
        ["suite", "vit:0x16", "--share", "0.9", "--layers", "2", "--optimizer", "sgd"],
    ],
)
def test_leaves_a_table(arguments: list[str], tmp_path: Path) -> None:
    """A case in a fresh process gives a line of Markdown, and JSON with the machine."""
    outcome = CliRunner().invoke(
        app, [*arguments, "--limit-s", "5", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert outcome.exit_code == 0, outcome.output
    data = json.loads((tmp_path / f"{arguments[0]}.json").read_text(encoding="utf-8"))
    (row,) = data["rows"]
    assert row["status"] in ("optimal", "feasible")
    assert row["peak_bytes"] <= row["budget_bytes"]
    assert data["circumstances"]["versions"]["torch"]
    assert "python -m benchmarks.scale" in data["circumstances"]["command"]
    words = (tmp_path / f"{arguments[0]}.md").read_text(encoding="utf-8")
    assert words.splitlines()[2].startswith(f"| {arguments[1]} |")


def test_table_has_errors_and_infeasible_rows() -> None:
    """A line has as many cells as the header, whatever came of it."""
    sizes = {
        "num_parameters": 1,
        "num_operators": 2,
        "resident_bytes": 3,
        "least_bytes": 4,
        "keep_all_bytes": 5,
        "budget_bytes": 1,
    }
    infeasible = {"case": "a", "status": "infeasible", "optimize_s": 1.0, **sizes}
    header, _, *lines = table([infeasible, {"case": "b", "error": "no"}]).splitlines()
    assert {line.count("|") for line in lines} == {header.count("|")}
    assert "infeasible" in lines[0]


@pytest.mark.slow
def test_a_frontier_in_blocks_is_a_row() -> None:
    """Three budgets of two narrow layers, and one plan in a file of its own, read again."""
    (many,) = work(narrow("llama-70b", batch=16, granularity="blocks", frontier=3, limit_s=1.0))
    found = many["frontier"]
    assert len(found["points"]) == 3
    budget = int(0.9 * found["unplanned_peak_bytes"])
    job = narrow("llama-70b", batch=16, granularity="blocks", budgets_bytes=(budget,), limit_s=2.0)
    (one,) = work(job)
    assert one["plan"]["bound_scope"] == "inside_blocks"
    words = blocks_table([{"case": "narrow", "frontier": found, "plan": one["plan"]}])
    header, _, row = words.splitlines()
    assert header.count("|") == row.count("|")
    assert "| 3 |" in row
