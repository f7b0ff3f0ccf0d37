"""The command of the comparison of record and its folder: what is asked, kept and read again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.compare import __main__ as command
from benchmarks.compare.folder import read, read_failures, write_settings
from benchmarks.compare.paired_runs import (
    NUM_PAIRS,
    OWN_PEAK,
    PairedRun,
)
from benchmarks.compare.worker import Job, as_compared, files_of, job_of, work, write_rows
from planner.comparing.comparison import Comparison
from tests.benchmarks.test_compare import comparison


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Takes the jobs that the command sends; the second model fails, the others leave a file."""
    sent: list[Job] = []

    def run(job: Job) -> str:
        sent.append(job)
        if len(sent) == 2:
            return "its process ended with -9"
        Path(job.out).mkdir(parents=True, exist_ok=True)
        comparison(130.0).save(Path(job.out) / f"{job.model}.json")
        return ""

    monkeypatch.setattr(command, "run_worker", run)
    return sent


def invoke(words: str, expected: int = 0) -> str:
    result = CliRunner().invoke(command.app, words)
    assert result.exit_code == expected, result.output
    return result.output


def test_strategies_can_be_left_out_and_peers_be_named(jobs: list[Job], tmp_path: Path) -> None:
    """The job has the names, and the thread count, which is one unless more are asked for."""
    invoke(
        "vgg16 --without moccasin --without checkmate_milp --peer checkpoint_sqrt "
        f"--peer compile_budget_0.4 --out {tmp_path}"
    )
    (job,) = jobs
    assert job.strategies is not None
    assert {"moccasin", "checkmate_milp"}.isdisjoint(job.strategies)
    assert {"auto", "dtr", "min_cut", "checkmate_lp_rounding"} <= set(job.strategies)
    assert job.peers == ("checkpoint_sqrt", "compile_budget_0.4")
    assert job.threads == 1


def test_the_settings_of_a_run_are_kept_whole(jobs: list[Job], tmp_path: Path) -> None:
    """Whatever a job was asked for can be read in compare.json, the date and command, too."""
    invoke(f"vgg16 --predicted --strategy auto --threads 2 --repeats 6 --out {tmp_path}")
    kept = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    settings = kept["settings"]
    assert settings["models"] == ["vgg16"]
    assert len(jobs) == 1
    assert {"peers", "repeats", "with_matched", "with_solved_at_peak", "threads"} <= set(settings)
    assert (settings["threads"], settings["repeats"], settings["strategies"]) == (2, 6, ["auto"])
    assert kept["circumstances"]["command"].startswith("python -m benchmarks.compare")
    assert "date" in kept["circumstances"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--without nobody", "nobody"),
        ("--peer nobody", "unknown peer"),
        ("--peer checkpoint_sqrt --no-peers", "exclude each other"),
        ("--peer checkpoint_sqrt --predicted", "executes nothing"),
        ("--strategy auto --without auto", "leaves no strategy"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(jobs: list[Job], words: str, said: str) -> None:
    """Before any model is compared."""
    assert said in " ".join(invoke(f"vgg16 {words}", expected=2).replace("│", " ").split())
    assert jobs == []


def test_the_page_is_there_after_each_model(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stops the third model leaves the page of the first two."""
    seen: list[str] = []

    def stop(job: Job) -> str:
        seen.append((tmp_path / "compare.md").read_text(encoding="utf-8"))
        raise KeyboardInterrupt

    before = command.run_worker
    monkeypatch.setattr(
        command, "run_worker", lambda job: stop(job) if job.model == "unet" else before(job)
    )
    CliRunner().invoke(command.app, f"vgg16 mobilenet unet --out {tmp_path}")
    assert "## vgg16" in seen[0]
    assert "| mobilenet | its process ended with -9" in seen[0]
    kept = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert kept["rows"][0]["model"] == "mobilenet"


def test_a_report_alone_has_the_failures_of_its_run(jobs: list[Job], tmp_path: Path) -> None:
    """Those that were kept, and models of which there is nothing, are named."""
    invoke(f"vgg16 mobilenet --out {tmp_path}", expected=1)
    invoke(f"vgg16 mobilenet unet --only-report --out {tmp_path}", expected=1)
    page = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "| mobilenet | its process ended with -9; " in page
    assert "has no unet.json" in page
    assert "## vgg16" in page


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "remat-comparison", "version": 1}'])
def test_a_damaged_file_is_told_and_the_others_are_read(tmp_path: Path, damage: str) -> None:
    """Of comparisons and of what lies beside them."""
    comparison(130.0).save(tmp_path / "vgg16.json")
    (tmp_path / "vgg16_matched.json").write_text("[]", encoding="utf-8")
    (tmp_path / "vgg16_settled.json").write_text('[{"strategies": 1}]', encoding="utf-8")
    (tmp_path / "unet.json").write_text(damage, encoding="utf-8")
    found = read(tmp_path, ("unet", "vgg16"), {})
    assert list(found.comparisons) == ["vgg16"]
    assert found.matches == {"vgg16": []}
    assert found.at_peak == {}
    assert "unet.json cannot be read" in found.failures["unet"]
    assert "vgg16_settled.json cannot be read" in found.failures["vgg16"]


def test_kept_failures_that_cannot_be_read_are_one(tmp_path: Path) -> None:
    """That they are not known is said; where there is no such file there were none."""
    assert read_failures(tmp_path, ("bert",)) == {}
    write_settings(tmp_path, {}, {"bert": "killed", "unet": "crashed"})
    assert read_failures(tmp_path, ("bert",)) == {"bert": "killed"}
    (tmp_path / "compare.json").write_text("[1]", encoding="utf-8")
    assert "cannot be read" in read_failures(tmp_path, ("bert",))["compare.json"]


def test_the_worker_sets_the_threads_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even before it finds that there is nothing to do."""
    asked: list[int] = []
    monkeypatch.setattr("benchmarks.compare.worker.torch.set_num_threads", asked.append)
    with pytest.raises(ValueError, match="unknown model"):
        work(Job(model="nobody", threads=3))
    assert asked == [3]


def test_a_job_goes_through_json_whole() -> None:
    """Names stay tuples."""
    job = Job(model="bert", strategies=("auto",), peers=("checkpoint_sqrt",), threads=2)
    assert job_of(json.dumps(asdict(job))) == job


def test_a_run_of_one_model_keeps_the_others_in_the_page(jobs: list[Job], tmp_path: Path) -> None:
    """With what failed of them."""
    invoke(f"unet mobilenet --predicted --out {tmp_path}", expected=1)
    invoke(f"vgg16 --predicted --out {tmp_path}")
    page = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "## unet" in page
    assert "## vgg16" in page
    kept = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert [failed["model"] for failed in kept["rows"]] == ["mobilenet"]


def test_duels_are_read_again(tmp_path: Path) -> None:
    """With those that did not run."""
    ran = PairedRun(
        strategy="dtr",
        budget_bytes=9,
        seen_peak_bytes=8,
        seen_ratio=1.05,
        why=OWN_PEAK,
        ratio=0.9,
        interval=(0.8, 1.0),
        num_pairs=4,
    )
    failed = replace(ran, ratio=None, interval=None, num_pairs=0, error="nothing fits")
    comparison(130.0).save(tmp_path / "unet.json")
    write_rows(tmp_path / "unet_duels.json", [ran, failed])
    assert read(tmp_path, ("unet",), {}).paired_runs == {"unet": [ran, failed]}


def test_only_paired_runs_leaves_the_comparison_where_it_is(
    jobs: list[Job], tmp_path: Path
) -> None:
    """What a run begins with is taken away: here nothing but what it will make."""
    invoke(f"vgg16 --only-paired-runs --out {tmp_path}")
    (job,) = jobs
    assert [path.name for path in files_of(job)] == ["vgg16_duels.json"]
    invoke(f"vgg16 --only-paired-runs --predicted --out {tmp_path}", 2)


def test_only_paired_runs_needs_a_comparison(tmp_path: Path) -> None:
    """Which is named."""
    with pytest.raises(FileNotFoundError, match=r"vgg16\.json"):
        work(Job(model="vgg16", size="tiny", only_paired_runs=True, out=str(tmp_path)))


@pytest.mark.slow
def test_paired_runs_of_a_tiny_model(tmp_path: Path) -> None:
    """A point that is made to look better is run again, by the same comparison's files."""
    words = "vgg16 --size tiny --limit-s 0.5 --num-budgets 2 --no-matched --repeats 2 --no-peers"
    names = ("auto", "none", "uniform_every_k")
    chosen = " ".join(f"--strategy {name}" for name in names)
    invoke(f"{words} {chosen} --no-paired-runs --out {tmp_path}")
    path = tmp_path / "vgg16.json"
    before = Comparison.load(path)
    lucky = [
        replace(row, measured=replace(row.measured, ratio=0.1, quartiles=(0.1, 0.1)))
        if row.strategy == "uniform_every_k" and row.measured is not None
        else row
        for row in before.rows
    ]
    replace(before, rows=tuple(lucky)).save(path)
    invoke(f"vgg16 --size tiny --limit-s 0.5 --only-paired-runs --out {tmp_path}")
    found = read(tmp_path, ("vgg16",), {}).paired_runs["vgg16"]
    assert found
    assert {one.strategy for one in found} == {"uniform_every_k"}
    assert all(one.num_pairs == NUM_PAIRS or one.same_schedule for one in found)
    assert "In turn with ours" in (tmp_path / "compare.md").read_text(encoding="utf-8")


def test_duels_are_fought_as_the_comparison_was_made() -> None:
    """Its costs, threads, seed and limit, whatever the command says."""
    known = replace(
        comparison(130.0), cost_model="profile", num_threads=2, seed=3, time_limit_s=9.0
    )
    job = as_compared(Job(model="tiny", only_paired_runs=True), known)
    assert (job.cost_model, job.threads, job.seed, job.limit_s) == ("profile", 2, 3, 9.0)
    with pytest.raises(ValueError, match="my own"):
        as_compared(job, replace(known, cost_model="my own"))
