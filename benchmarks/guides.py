"""What fits where: three usual model sizes at three usual budgets, ``make bench-guides``.

The sizes, batches and budgets are those of guides on training: 125 million parameters
at batch 32, 1.5 billion at 16, 6 billion at 8; 8, 20 and 32 GB. For each: whether the
step fits without a plan, whether a plan makes it fit, and at what cost. If nothing fits:
the least budget that would work, and what determines it.

Nothing is run, and there are no weights. With ``--device cpu``, times are those of one
CPU core by the roofline, and kernels' scratch memory is not counted: only a card's
figures say what training there would take.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from graph_capture.costs.devices import DEVICES

from .plan_runs import described, markdown, planned, surveyed, write_json
from .plan_worker import Job
from .scale import WEIGHTS

BUDGETS_GB = (8.0, 20.0, 32.0)


class Size(NamedTuple):
    """A model at its usual batch."""

    words: str
    model: str
    batch: int


SIZES = {
    "125m": Size("125M (GPT-2 small)", "gpt2", 32),
    "1.5b": Size("1.5B (GPT-2 XL)", "gpt2-xl", 16),
    "6b": Size("6B (GPT-J)", "gptj-6b", 8),
}


class Way(NamedTuple):
    """How it is trained: dtypes (a key of ``WEIGHTS``) and optimizer."""

    words: str
    numbers: str
    optimizer: str


WAYS = {
    "fp32": Way("float32, AdamW", "fp32", "adamw"),
    "autocast": Way("float32 weights under bfloat16 autocast, AdamW", "autocast", "adamw"),
    "bf16": Way("bfloat16, SGD without momentum", "bf16", "sgd"),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def guides(
    size: Annotated[
        list[str] | None, typer.Option(help=f"by default {' '.join(SIZES)}", show_default=False)
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(help=f"by default {' '.join(WAYS)}", show_default=False)
    ] = None,
    budget_gb: Annotated[
        list[float] | None, typer.Option(help="by default 8, 20, 32", show_default=False)
    ] = None,
    sequence: Annotated[int, typer.Option(help="tokens", min=1)] = 1024,
    device: Annotated[str, typer.Option(help="cpu, or a card that need not be at hand")] = "a100",
    layers: Annotated[
        int | None, typer.Option(help="instead of the published number", min=1)
    ] = None,
    headroom: Annotated[
        float | None, typer.Option(help="share of the budget; by default optimize()'s")
    ] = None,
    loss_only: Annotated[
        bool, typer.Option(help="the model hands out its loss and not its logits")
    ] = False,
    limit_s: Annotated[float, typer.Option(help="of each solve, in s", min=0.1)] = 60.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path, typer.Option(help="folder for JSON and Markdown")] = Path(
        "build/bench-guides"
    ),
) -> None:
    """The table of the usual guides: what fits in 8, 20 and 32 GB, and at what cost."""
    budgets_gb = budget_gb or BUDGETS_GB
    if device not in DEVICES:
        raise typer.BadParameter(f"unknown device {device!r}; known are {', '.join(DEVICES)}")
    rows: list[dict[str, Any]] = []
    for way_name in _known(way, WAYS):
        for size_name in _known(size, SIZES):
            model, trained = SIZES[size_name], WAYS[way_name]
            weights, autocast = WEIGHTS[trained.numbers]
            job = Job(
                model=model.model,
                batch=model.batch,
                sequence=sequence,
                weights=weights,
                autocast=autocast,
                optimizer=trained.optimizer,
                device=None if device == "cpu" else device,
                layers=layers,
                limit_s=limit_s,
                seed=seed,
                headroom=headroom,
                loss_only=loss_only,
                budgets_bytes=tuple(round(gb * 1e9) for gb in budgets_gb),
            )
            rows += _cells(job, {"size": size_name, "way": way_name})
    settings = {
        "device": device,
        "sequence": sequence,
        "loss_only": loss_only,
        "budgets_gb": list(budgets_gb),
        "limit_s": limit_s,
        "seed": seed,
    }
    stem = f"guides-{device}-{sequence}{'-loss-only' if loss_only else ''}"
    write_json(out / f"{stem}.json", rows, settings, "benchmarks.guides")
    handed_out = "the loss alone" if loss_only else "loss and logits"
    title = f"{DEVICES[device].title}, {sequence} tokens, {handed_out} handed out"
    words = tables(rows, title)
    (out / f"{stem}.md").write_text(words, encoding="utf-8")
    typer.echo(words)
    typer.echo(f"written to {out}/{stem}.json and {stem}.md")


def tables(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown: a table for each way of training, and below it why others do not fit."""
    header = [
        "model",
        "batch",
        "budget, GB",
        "peak without a plan, GB",
        "fits",
        "with a plan",
        "peak, GB",
        "overhead",
        "at least",
        "gap",
        "solve, s",
    ]
    parts = [f"# {title}\n"]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        parts.append(f"## {WAYS[way].words}\n")
        parts.append(markdown(header, [_line(row) for row in own]))
        none_fits = [row for row in own if row.get("status") == "infeasible"]
        reasons = {row["size"]: row["why"] for row in none_fits}  # those of the largest budget
        parts.append("".join(f"- {SIZES[size].words}: {why}\n" for size, why in reasons.items()))
    return "\n".join(part for part in parts if part)


def _line(row: dict[str, Any]) -> list[str]:
    first = [SIZES[row["size"]].words, str(row["batch"]), f"{row['budget_bytes'] / 1e9:g}"]
    if "error" in row:
        return [*first, "", "", row["error"], *[""] * 5]
    unplanned = row["unplanned_bytes"]
    usable = row["budget_bytes"] - row.get("headroom_bytes", 0)
    first += [f"{unplanned / 1e9:.2f}", "yes" if unplanned <= usable else "no"]
    if row["status"] == "infeasible":
        needed = f"no: {row['min_budget_bytes'] / 1e9:.2f} GB are needed"
        return [*first, needed, *[""] * 4, f"{row['optimize_s']:.1f} (no plan)"]
    return [
        *first,
        "yes" if unplanned > usable else "not needed",
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['overhead']:.2%}",
        f"{row['lower_bound_us'] / row['unplanned_us'] - 1:.2%}",
        f"{row['gap']:.3%}",
        f"{row['solve_s']:.1f}",
    ]


def _cells(job: Job, cell: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each budget of the job, with the sizes of its step."""
    sizes = surveyed(replace(job, survey=True, budgets_bytes=()))
    if "error" in sizes:
        budgets = job.budgets_bytes
        return [{**cell, **described(job), "budget_bytes": b, **sizes} for b in budgets]
    of_survey = {f"survey_{key}" if key.endswith("_s") else key: sizes[key] for key in sizes}
    return [
        {**cell, **described(job), **of_survey, "budget_bytes": budget, **result}
        for budget, result in zip(job.budgets_bytes, planned(job), strict=True)
    ]


def _known(names: list[str] | None, known: dict[str, Any]) -> list[str]:
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return list(names or known)


if __name__ == "__main__":
    app()
