"""``python -m benchmarks.compare``: every strategy on the models of record, ``make bench-compare``.

Each model is compared in a fresh process, so that one that crashes leaves the
others. The folder then has JSON and CSV of each, figures, and ``compare.md``.
Tables can be written again from the JSON files (``--only-report``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from planner.comparing.chosen import choose_strategies
from planner.comparing.comparison import Comparison
from planner.comparing.peers import PEERS
from solvers.strategies import STRATEGIES

from ..models import SUBJECTS
from ..models.subject import SIZES, Size
from ..plan_runs import write_json
from ..run import ROOT
from .matched import Matched
from .tables import report
from .worker import Job, files_of

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
    peers: Annotated[bool, typer.Option(help="run the peers, too")] = True,
    matched: Annotated[bool, typer.Option(help="ours at the peaks and costs of others")] = True,
    num_budgets: Annotated[int, typer.Option(min=2)] = 7,
    optimizer: Annotated[
        str | None, typer.Option(help="by default none", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(help="timed pairs of steps", min=0)] = 8,
    limit_s: Annotated[float, typer.Option(help="of each solve, in s", min=0.1)] = 30.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
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
    failures: dict[str, str] = {}
    for name in () if only_report else names:
        job = Job(
            model=name,
            size=known_size,
            execute=not predicted,
            strategies=None if strategy is None else tuple(strategy),
            peers=tuple(PEERS) if peers and not predicted else (),
            num_budgets=num_budgets,
            optimizer=optimizer,
            repeats=repeats,
            with_matched=matched,
            limit_s=limit_s,
            seed=seed,
            out=str(out.resolve()),
        )
        if error := run_worker(job):
            failures[name] = error
            typer.echo(f"{name}: {error}", err=True)
    words, found = read(out, names)
    rows = [{"model": name, "failure": why} for name, why in failures.items()]
    settings = {
        "models": list(names),
        "size": size,
        "predicted": predicted,
        "strategies": list(strategy or choose_strategies(None, STRATEGIES)[1]),
        "num_budgets": num_budgets,
        "optimizer": optimizer,
        "limit_s": limit_s,
        "seed": seed,
    }
    if not only_report:
        write_json(out / "compare.json", rows, settings, "benchmarks.compare")
    path = out / "compare.md"
    path.write_text(report(words, found, failures), encoding="utf-8")
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"written to {out}")
    raise typer.Exit(1 if failures else 0)


def run_worker(job: Job) -> str:
    """Compare one model in a fresh process; what went wrong, or nothing.

    What an earlier run left of the model goes first, so that nothing old is taken
    for a result of this one.
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


def read(
    folder: Path, names: tuple[str, ...]
) -> tuple[dict[str, Comparison], dict[str, list[Matched]]]:
    """What lies in the folder of these models."""
    comparisons: dict[str, Comparison] = {}
    matches: dict[str, list[Matched]] = {}
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            comparisons[name] = Comparison.load(path)
        path = folder / f"{name}_matched.json"
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            matches[name] = [Matched(**row) for row in rows]
    return comparisons, matches


def _known_size(size: str) -> Size:
    for known in SIZES:
        if size == known:
            return known
    raise typer.BadParameter(f"size is one of {', '.join(SIZES)}, not {size!r}")


if __name__ == "__main__":
    app()
