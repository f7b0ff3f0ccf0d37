"""``python -m benchmarks.compare``: every strategy on the models of record, ``make bench-compare``.

Each model is compared in a fresh process, so that a crash does not affect the others.
The folder then has JSON and CSV of each model, figures, and ``compare.md``, which is
rewritten after each model. ``--only-report`` writes the tables again from the JSON
files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from planner.base.atomic_write import write_whole
from planner.comparing.peers import PEERS
from planner.comparing.strategy_choice import choose_strategies
from solvers.strategies import STRATEGIES

from ..models import SUBJECTS
from ..models.subject import SIZES, Size
from ..run import ROOT
from .folder import Found, read, read_failures, write_settings
from .tables import report
from .worker import COST_MODELS, CostModelName, Job, files_of

RECORD = ("bert", "gpt2", "llama", "t5", "vit", "resnet50", "unet", "vgg16", "mobilenet")

app = typer.Typer(
    help="Every strategy on the models of record.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def main(
    model: Annotated[
        list[str] | None,
        typer.Argument(help=f"by default {' '.join(RECORD)}", show_default=False),
    ] = None,
    size: Annotated[str, typer.Option(help=f"one of {', '.join(SIZES)}")] = "record",
    predicted: Annotated[bool, typer.Option("--predicted", help="execute nothing")] = False,
    strategy: Annotated[
        list[str] | None, typer.Option(help="by default all", show_default=False)
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="a strategy to leave out", show_default=False)
    ] = None,
    peers: Annotated[bool, typer.Option(help="run the peers, too")] = True,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="by default all but those that take a budget", show_default=False),
    ] = None,
    solved_at_peak: Annotated[
        bool, typer.Option(help="ours at the peaks of others' open points")
    ] = True,
    matched: Annotated[bool, typer.Option(help="ours at the peaks and costs of others")] = True,
    paired_runs: Annotated[
        bool, typer.Option(help="what measured better than ours, in turn with ours")
    ] = True,
    only_paired_runs: Annotated[
        bool, typer.Option("--only-paired-runs", help="do that for the comparisons in --out")
    ] = False,
    num_budgets: Annotated[int, typer.Option(min=2)] = 7,
    optimizer: Annotated[
        str | None, typer.Option(help="by default none", show_default=False)
    ] = None,
    cost_model: Annotated[
        str, typer.Option(help=f"where predicted times are from: {' or '.join(COST_MODELS)}")
    ] = "roofline",
    repeats: Annotated[int, typer.Option(help="timed pairs of steps", min=0)] = 8,
    limit_s: Annotated[float, typer.Option(help="of each solve, in s", min=0.1)] = 30.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(help="of PyTorch's kernels", min=1)] = 1,
    only_report: Annotated[
        bool, typer.Option("--only-report", help="tables of the files in --out")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder")] = Path("build/compare"),
) -> None:
    """Compare, and leave tables and figures."""
    names = tuple(model or RECORD)
    known_size = _known_size(size)
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise typer.BadParameter(f"unknown model {unknown[0]!r}; known are {', '.join(SUBJECTS)}")
    job = Job(
        model="",
        size=known_size,
        execute=not predicted,
        strategies=_chosen_strategies(strategy, without),
        peers=_chosen_peers(peer, wanted=peers, predicted=predicted),
        num_budgets=num_budgets,
        optimizer=optimizer,
        cost_model=_known_cost_model(cost_model),
        repeats=repeats,
        with_solved_at_peak=solved_at_peak,
        with_matched=matched,
        with_paired_runs=paired_runs,
        only_paired_runs=only_paired_runs,
        threads=threads,
        limit_s=limit_s,
        seed=seed,
        out=str(out.resolve()),
    )
    if only_paired_runs and (predicted or not paired_runs or only_report):
        raise typer.BadParameter(
            "--only-paired-runs excludes --predicted, --no-paired-runs and --only-report"
        )
    if only_report:
        if not out.is_dir():
            raise typer.BadParameter(f"there is no folder {out}")
        there = names_in(out, model or ())
        found = read(out, there, read_failures(out, there))
        for name, why in found.failures.items():
            typer.echo(f"{name}: {why}", err=True)
    else:
        found = run_all(names, job, out)
    path = write_report(out, found)
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"written to {out}")
    # Failures of an earlier run stay on the page; the exit code concerns this run's models.
    raise typer.Exit(1 if any(only_report or name in names for name in found.failures) else 0)


def run_all(names: Sequence[str], job: Job, out: Path) -> Found:
    """Compare one model after the other, and write the page after each."""
    settings = {"models": list(names), **asdict(job)}
    del settings["model"]
    failures = read_failures(out, [name for name in SUBJECTS if name not in names])
    for i, name in enumerate(names):
        if error := run_worker(replace(job, model=name)):
            failures[name] = error
            typer.echo(f"{name}: {error}", err=True)
        write_settings(out, settings, failures)
        found = read(out, names_in(out, names[: i + 1]), failures)
        write_report(out, found)
    return found


def names_in(out: Path, asked: Sequence[str]) -> tuple[str, ...]:
    """The requested models, and those that an earlier run left there."""
    ordered = dict.fromkeys([*RECORD, *SUBJECTS, *asked])
    return tuple(n for n in ordered if n in asked or (out / f"{n}.json").exists())


def write_report(out: Path, found: Found) -> Path:
    """Write the page of tables."""
    path = out / "compare.md"
    write_whole(path, report(found))
    return path


def run_worker(job: Job) -> str:
    """Compare one model in a fresh process; return what went wrong, or ``""``.

    An earlier run's files of the model are removed first, so that nothing old is taken
    for a result of this run.
    """
    for path in files_of(job):
        path.unlink(missing_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare.worker", json.dumps(asdict(job))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    last = "nothing"
    try:
        for line in child.stdout:
            last = line.strip()
            typer.echo(f"{job.model}: {last}", err=True)
        child.wait()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    if child.returncode:
        return f"its process ended with {child.returncode}; the last that it began was: {last}"
    return ""


def _chosen_strategies(
    strategy: Sequence[str] | None, without: Sequence[str] | None
) -> tuple[str, ...]:
    """Names, in the order of the registry."""
    try:
        names = choose_strategies(strategy, STRATEGIES)[1]
        left_out = choose_strategies(without or (), STRATEGIES)[1]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not (chosen := tuple(name for name in names if name not in left_out)):
        raise typer.BadParameter("--without leaves no strategy")
    return chosen


def _chosen_peers(peer: Sequence[str] | None, *, wanted: bool, predicted: bool) -> tuple[str, ...]:
    """Names, in the given order; by default those that run once, not at each budget."""
    if peer and not wanted:
        raise typer.BadParameter("--no-peers and --peer exclude each other")
    if peer and predicted:
        raise typer.BadParameter("--predicted executes nothing, and peers have no other figures")
    if unknown := [name for name in peer or () if name not in PEERS]:
        raise typer.BadParameter(f"unknown peer {unknown[0]!r}; known are {', '.join(PEERS)}")
    once = [name for name, known in PEERS.items() if not known.needs_budget]
    return tuple(dict.fromkeys(peer or once)) if wanted and not predicted else ()


def _known_cost_model(name: str) -> CostModelName:
    for known in COST_MODELS:
        if name == known:
            return known
    raise typer.BadParameter(f"the cost model is {' or '.join(COST_MODELS)}, not {name!r}")


def _known_size(size: str) -> Size:
    for known in SIZES:
        if size == known:
            return known
    raise typer.BadParameter(f"size is one of {', '.join(SIZES)}, not {size!r}")


if __name__ == "__main__":
    app()
