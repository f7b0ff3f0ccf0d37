"""``python -m benchmarks.literature {chains,checkmate,half}``: predicted tables, nothing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..models import SUBJECTS
from ..models.subject import (
    SIZES,
    Size,
)
from ..plan_runs import write_json
from . import checkmate as jain
from .batches import Rule
from .chain_steps import FAMILIES
from .chains import (
    chain_rows,
    chain_tables,
)
from .half import (
    half_row,
    half_table,
)

PLAIN_LAYERS = (4, 8, 16, 32, 64, 128, 256, 512)
CAPTURED_LAYERS = (4, 8, 16, 32, 64)
AUTOCAST = {"none": None, "bf16": torch.bfloat16}

app = typer.Typer(
    help="Experiments of the literature, by prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="folder for JSON and Markdown")]
Seed = Annotated[int, typer.Option(min=0)]
OUT = Path("build/literature")


@app.command()
def chains(
    family: Annotated[
        list[str] | None, typer.Option(help=f"by default {' '.join(FAMILIES)}", show_default=False)
    ] = None,
    layers: Annotated[
        list[int] | None,
        typer.Option(help="by default 4 to 512, captured chains to 64", show_default=False),
    ] = None,
    limit_s: Annotated[float, typer.Option(help="of each solve, in s", min=0.1)] = 5.0,
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Growth of memory on chains: √L with its 33 %, log L, and the optimum at their peaks."""
    rows: list[dict[str, Any]] = []
    for name in _known(family, FAMILIES):
        for num_layers in layers or (PLAIN_LAYERS if name == "plain" else CAPTURED_LAYERS):
            graph = FAMILIES[name](num_layers)
            rows += chain_rows(name, num_layers, graph, time_limit_s=limit_s, seed=seed, say=_say)
    _leave(out, "chains", rows, {"limit_s": limit_s, "seed": seed}, chain_tables(rows))


@app.command()
def checkmate(
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help=f"networks to sweep budgets for; by default {' '.join(jain.SWEPT)}",
            show_default=False,
        ),
    ] = None,
    enlarge: Annotated[
        list[str] | None,
        typer.Option(
            help=f"networks to enlarge; by default {' '.join(jain.ENLARGED)}", show_default=False
        ),
    ] = None,
    part: Annotated[str, typer.Option(help="sweep, enlarge or both")] = "both",
    size: Annotated[str, typer.Option(help=f"one of {', '.join(SIZES)}")] = "paper",
    budget_gb: Annotated[float, typer.Option(help="for the largest batch", min=0.001)] = 16.0,
    extra_forwards: Annotated[float, typer.Option(help="allowed again", min=0.0)] = 1.0,
    limit_s: Annotated[float, typer.Option(help="of each solve, in s", min=0.1)] = 10.0,
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Checkmate's figures: overhead against budget, and the largest batch in 16 GB."""
    if part not in ("sweep", "enlarge", "both"):
        raise typer.BadParameter(f"part is sweep, enlarge or both, not {part!r}")
    chosen = _size(size)
    settings = {
        "limit_s": limit_s,
        "seed": seed,
        "size": chosen,
        "device": jain.V100.title,
        "source": jain.V100.source,
    }
    if part != "enlarge":
        names = _known(sweep, SUBJECTS, jain.SWEPT)
        swept: list[dict[str, Any]] = []
        for name in names:
            swept += jain.sweep_rows(name, size=chosen, time_limit_s=limit_s, seed=seed, say=_say)
        _leave(out, "checkmate-sweep", swept, settings, jain.sweep_tables(swept))
    if part != "sweep":
        rule = Rule(budget_bytes=round(budget_gb * 1e9), extra_forwards=extra_forwards)
        rows: list[dict[str, Any]] = []
        for name in _known(enlarge, SUBJECTS, jain.ENLARGED):
            rows += jain.batch_rows(
                name, size=chosen, rule=rule, time_limit_s=limit_s, seed=seed, say=_say
            )
        words = f"{jain.batch_table(rows)}\n{jain.PUBLISHED}"
        _leave(out, "checkmate-batch", rows, {**settings, "budget_gb": budget_gb}, words)


@app.command()
def half(
    model: Annotated[
        list[str] | None, typer.Option(help="by default all", show_default=False)
    ] = None,
    size: Annotated[str, typer.Option(help=f"one of {', '.join(SIZES)}")] = "paper",
    device: Annotated[str, typer.Option(help="cpu, or a card that need not be at hand")] = "a100",
    autocast: Annotated[str, typer.Option(help=f"one of {', '.join(AUTOCAST)}")] = "none",
    optimizer: Annotated[str | None, typer.Option(help="a name that optimize() knows")] = None,
    share: Annotated[float, typer.Option(help="of the peak")] = 0.5,
    overhead: Annotated[float, typer.Option(help="for the least peak")] = 0.2,
    limit_s: Annotated[float, typer.Option(help="of each solve, in s", min=0.1)] = 20.0,
    seed: Seed = 0,
    out: Out = OUT,
) -> None:
    """Half of the memory for a fifth of the time: per-layer checkpointing beside the optimum."""
    if autocast not in AUTOCAST:
        raise typer.BadParameter(f"autocast is one of {', '.join(AUTOCAST)}, not {autocast!r}")
    chosen = _size(size)
    rows = [
        half_row(
            SUBJECTS[name](chosen),
            device=None if device == "cpu" else device,
            autocast=AUTOCAST[autocast],
            optimizer=optimizer,
            share=share,
            overhead=overhead,
            time_limit_s=limit_s,
            seed=seed,
            say=_say,
        )
        for name in _known(model, SUBJECTS)
    ]
    settings = {
        "limit_s": limit_s,
        "seed": seed,
        "size": chosen,
        "device": device,
        "autocast": autocast,
        "optimizer": optimizer,
    }
    _leave(out, f"half-{chosen}-{device}", rows, settings, half_table(rows))


def _size(name: str) -> Size:
    for size in SIZES:
        if size == name:
            return size
    raise typer.BadParameter(f"size is one of {', '.join(SIZES)}, not {name!r}")


def _known(names: list[str] | None, known: Any, usual: tuple[str, ...] = ()) -> list[str]:
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return list(names or usual or known)


def _say(words: str) -> None:
    typer.echo(words, err=True)


def _leave(
    folder: Path, stem: str, rows: list[dict[str, Any]], settings: dict[str, Any], words: str
) -> None:
    write_json(folder / f"{stem}.json", rows, settings, "benchmarks.literature")
    (folder / f"{stem}.md").write_text(words, encoding="utf-8")
    typer.echo(words)
    typer.echo(f"written to {folder}/{stem}.json and {stem}.md")


if __name__ == "__main__":
    app()
