"""Plan very deep and wide models, without their weights: ``make bench-scale``.

``deep`` plans steps of published shapes at full width and depth. Budgets are shares of
the way from the least peak to the peak when nothing is recomputed: no single card holds
these models, and a share says how tight a budget is, regardless of the weights.
``blocks`` plans the same steps inside their layers, at one budget and at twenty.
``suite`` plans the usual twelve-layer models at half of their memory. Each plan is made
in a fresh process. Times are those of this machine, memory is the process's own.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .plan_runs import described, frontier_from, markdown, planned, surveyed, write_json
from .plan_worker import Job
from .shapes import SHAPES

DEEP = (
    "llama-70b:4096x1",
    "llama-70b:8192x1",
    "llama-70b:8192x2",
    "gpt3-175b:4096x1",
    "gpt3-175b:8192x1",
)
IN_BLOCKS = ("llama-70b:8192x2", "gpt3-175b:2048x16")
SHARES = (0.1, 0.25, 0.5)
SUITE = ("bert:512x4", "gpt2:512x4", "llama-small:512x8", "t5:512x8", "vit:0x32")

WEIGHTS: dict[str, tuple[str, str | None]] = {
    "fp32": ("float32", None),
    "bf16": ("bfloat16", None),
    "autocast": ("float32", "bfloat16"),
}
"""Weights and autocast by name."""

app = typer.Typer(
    help="Plan deep models without their weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="folder for JSON and Markdown")]
Limit = Annotated[float, typer.Option(help="of each solve, in s", min=0.1)]
Seed = Annotated[int, typer.Option(min=0)]
Card = Annotated[str | None, typer.Option(help="plan for this device; by default the CPU")]
Layers = Annotated[int | None, typer.Option(help="instead of the published number", min=1)]
Numbers = Annotated[str, typer.Option(help=f"one of {', '.join(WEIGHTS)}")]
Optimizer = Annotated[str, typer.Option(help="a name that optimize() knows")]


@app.command()
def deep(
    case: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"MODEL:SEQUENCExBATCH; by default {' '.join(DEEP)}", show_default=False
        ),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            help="budgets between the least peak (0) and keep-all (1); by default 0.1, 0.25, 0.5",
            show_default=False,
        ),
    ] = None,
    numbers: Numbers = "bf16",
    optimizer: Optimizer = "adamw",
    device: Card = None,
    layers: Layers = None,
    limit_s: Limit = 60.0,
    seed: Seed = 0,
    out: Out = Path("build/bench-scale"),
) -> None:
    """Plan at shares of the way from the least peak to keep-all."""
    rows: list[dict[str, Any]] = []
    for name in case or DEEP:
        job = parse_case(
            name,
            numbers,
            optimizer=optimizer,
            device=device,
            layers=layers,
            limit_s=limit_s,
            seed=seed,
        )
        sizes = _said(name, surveyed(replace(job, survey=True)))
        if "error" in sizes:
            rows.append({"case": name, **described(job), **sizes})
            continue
        for s in share or SHARES:
            room = sizes["keep_all_bytes"] - sizes["least_bytes"]
            budget = int(sizes["least_bytes"] + s * room)
            rows += _plans(replace(job, budgets_bytes=(budget,)), name, sizes, {"share": s})
    settings = {"limit_s": limit_s, "seed": seed, "shares": list(share or SHARES)}
    _leave(out / "deep", rows, settings)


@app.command()
def blocks(
    case: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"MODEL:SEQUENCExBATCH; by default {' '.join(IN_BLOCKS)}", show_default=False
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="of the peak without a plan, of one plan")] = 0.85,
    budgets: Annotated[int, typer.Option(help="of the frontier, from the least up", min=2)] = 20,
    numbers: Numbers = "bf16",
    optimizer: Optimizer = "adamw",
    device: Card = "h100",
    layers: Layers = None,
    limit_s: Limit = 60.0,
    seed: Seed = 0,
    out: Out = Path("build/bench-scale"),
) -> None:
    """Plan inside the layers: one plan, and plans at many budgets from one capture."""
    rows: list[dict[str, Any]] = []
    for name in case or IN_BLOCKS:
        job = parse_case(
            name,
            numbers,
            optimizer=optimizer,
            device=device,
            layers=layers,
            limit_s=limit_s,
            seed=seed,
        )
        job = replace(job, granularity="blocks")
        many = _said(name, frontier_from(replace(job, frontier=budgets)))
        row = {"case": name, **described(job), "frontier": many}
        if "error" not in many:
            budget = int(share * many["unplanned_peak_bytes"])
            (row["plan"],) = planned(replace(job, budgets_bytes=(budget,)))
            _said(name, row["plan"])
        rows.append(row)
    words = blocks_table(rows)
    write_json(out / "blocks.json", rows, {"share": share, "budgets": budgets}, "benchmarks.scale")
    (out / "blocks.md").write_text(words, encoding="utf-8")
    typer.echo(words)
    typer.echo(f"written to {out / 'blocks'}.json and {out / 'blocks'}.md")


@app.command()
def suite(
    case: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"MODEL:SEQUENCExBATCH; by default {' '.join(SUITE)}", show_default=False
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="of the peak without a plan")] = 0.5,
    weights_on: Annotated[str, typer.Option(help="meta or cpu; on cpu scratch is measured")] = (
        "meta"
    ),
    numbers: Numbers = "fp32",
    optimizer: Optimizer = "adamw",
    device: Card = None,
    layers: Layers = None,
    limit_s: Limit = 60.0,
    seed: Seed = 0,
    out: Out = Path("build/bench-scale"),
) -> None:
    """Plan at a share of the peak without a plan; what counts is the total time."""
    rows: list[dict[str, Any]] = []
    for name in case or SUITE:
        job = parse_case(
            name,
            numbers,
            optimizer=optimizer,
            device=device,
            layers=layers,
            limit_s=limit_s,
            seed=seed,
        )
        job = replace(job, lies_on=weights_on)
        sizes = _said(name, surveyed(replace(job, survey=True)))
        if "error" in sizes:
            rows.append({"case": name, **described(job), **sizes})
            continue
        budget = int(share * sizes["unplanned_bytes"])
        rows += _plans(replace(job, budgets_bytes=(budget,)), name, sizes, {"share": share})
    settings = {"limit_s": limit_s, "seed": seed, "share": share, "weights_on": weights_on}
    _leave(out / "suite", rows, settings)
    total_s = sum(row.get("optimize_s", 0.0) for row in rows)
    typer.echo(f"capture and plan of all: {total_s:.1f} s")


def parse_case(
    case: str,
    numbers: str = "bf16",
    *,
    optimizer: str = "adamw",
    device: str | None = None,
    layers: int | None = None,
    limit_s: float = 60.0,
    seed: int = 0,
) -> Job:
    """The job of ``MODEL:SEQUENCExBATCH``.

    Raises
    ------
    typer.BadParameter
        When it is not such a case, or ``numbers`` is unknown.

    Examples
    --------
    >>> job = parse_case("llama-70b:8192x2")
    >>> job.model, job.sequence, job.batch, job.weights
    ('llama-70b', 8192, 2, 'bfloat16')
    """
    model, _, size = case.partition(":")
    sequence, _, batch = size.partition("x")
    if model not in SHAPES or not sequence.isdigit() or not batch.isdigit() or int(batch) < 1:
        raise typer.BadParameter(
            f"{case!r} is not MODEL:SEQUENCExBATCH with a model of {', '.join(SHAPES)}"
        )
    if numbers not in WEIGHTS:
        raise typer.BadParameter(f"numbers are one of {', '.join(WEIGHTS)}, not {numbers!r}")
    weights, autocast = WEIGHTS[numbers]
    return Job(
        model=model,
        batch=int(batch),
        sequence=int(sequence),
        weights=weights,
        autocast=autocast,
        optimizer=optimizer,
        device=device,
        layers=layers,
        limit_s=limit_s,
        seed=seed,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was planned, how well, and at what cost."""
    header = [
        "case",
        "parameters, 10^9",
        "operators",
        "resident, GB",
        "least, GB",
        "keep-all, GB",
        "budget, GB",
        "overhead",
        "gap",
        "capture + plan, s",
        "of these solve, s",
        "memory, GB",
        "file, MB",
        "save + load, s",
    ]
    return markdown(header, [_line(row) for row in rows])


def blocks_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one plan and a frontier in blocks, and their times."""
    header = [
        "case",
        "least, GB",
        "keep-all, GB",
        "budget, GB",
        "overhead",
        "gap",
        "capture + plan, s",
        "of these solve, s",
        "save + load, s",
        "budgets",
        "overheads",
        "greatest gap",
        "all of them, s",
        "memory, GB",
    ]
    return markdown(header, [_blocks_line(row) for row in rows])


def _blocks_line(row: dict[str, Any]) -> list[str]:
    many, plan = row["frontier"], row.get("plan", {})
    if "error" in many or "overhead" not in plan:
        return [row["case"], many.get("error") or plan.get("error") or plan["why"], *[""] * 12]
    points = [point for point in many["points"] if "gap" in point]
    return [
        row["case"],
        f"{many['points'][0]['budget_bytes'] / 1e9:.1f}",
        f"{many['unplanned_peak_bytes'] / 1e9:.1f}",
        f"{plan['budget_bytes'] / 1e9:.1f}",
        f"{plan['overhead']:.2%}",
        f"{plan['gap']:.3%}",
        f"{plan['optimize_s']:.1f}",
        f"{plan['solve_s']:.1f}",
        f"{plan['save_s'] + plan['load_s']:.1f}",
        str(len(points)),
        f"{points[0]['overhead']:.2%} to {points[-1]['overhead']:.2%}",
        f"{max(point['gap'] for point in points):.3%}",
        f"{many['frontier_s']:.1f}",
        f"{many['max_rss_bytes'] / 1e9:.2f}",
    ]


def _line(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["case"], row["error"], *[""] * 12]
    sizes = [
        f"{row['num_parameters'] / 1e9:.1f}",
        str(row["num_operators"]),
        *(
            f"{row[key] / 1e9:.2f}"
            for key in ("resident_bytes", "least_bytes", "keep_all_bytes", "budget_bytes")
        ),
    ]
    if row["status"] == "infeasible":
        return [row["case"], *sizes, "infeasible", "", f"{row['optimize_s']:.1f}", *[""] * 4]
    return [
        row["case"],
        *sizes,
        f"{row['overhead']:.2%}",
        f"{row['gap']:.3%}",
        f"{row['optimize_s']:.1f}",
        f"{row['solve_s']:.1f}",
        f"{row['max_rss_bytes'] / 1e9:.2f}",
        f"{row['file_bytes'] / 1e6:.1f}",
        f"{row['save_s'] + row['load_s']:.1f}",
    ]


def _plans(
    job: Job, case: str, sizes: dict[str, Any], more: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each budget of the job."""
    of_survey = {f"survey_{key}" if key.endswith("_s") else key: sizes[key] for key in sizes}
    return [
        {"case": case, **described(job), **of_survey, **more, **_said(case, result)}
        for result in planned(job)
    ]


def _said(case: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result; also prints a line about it while the rest runs."""
    told = {key: value for key, value in result.items() if key not in ("log", "report")}
    Console(stderr=True, width=200 if not sys.stderr.isatty() else None).print(case, told)
    return result


def _leave(path: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    write_json(path.with_suffix(".json"), rows, settings, "benchmarks.scale")
    words = table(rows)
    path.with_suffix(".md").write_text(words, encoding="utf-8")
    typer.echo(words)
    typer.echo(f"written to {path}.json and {path}.md")


if __name__ == "__main__":
    app()
