"""``python -m benchmarks.figures``: draw the figures of one model for the documents.

Memory over the step and the table of layers show a plan that is made here. Budget
against overhead shows a comparison written by ``python -m benchmarks.compare``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner import optimize
from planner.comparing.comparison import Comparison
from planner.plots import plot_layers, plot_memory, plot_pareto
from planner.plots.points import measured_point
from solvers.replay import replay
from solvers.schedule import Schedule

from .models import SUBJECTS
from .models.subject import SIZES, Size

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help=f"one of {' '.join(SUBJECTS)}")] = "gpt2",
    size: Annotated[str, typer.Option(help=f"one of {', '.join(SIZES)}")] = "record",
    budget: Annotated[float, typer.Option(help="share of the unplanned peak", min=0)] = 0.4,
    comparison: Annotated[
        Path | None, typer.Option(help="JSON of a comparison, for the Pareto figure")
    ] = None,
    limit_s: Annotated[float, typer.Option(help="for solving, in s", min=0.1)] = 60.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path, typer.Option(help="folder")] = Path("docs/figures"),
) -> None:
    """Draw memory_MODEL.png, layers_MODEL.png and, for a comparison, pareto_MODEL.png.

    If its steps were timed, also draw pareto_measured_MODEL.png.
    """
    if model not in SUBJECTS or size not in SIZES:
        raise typer.BadParameter(
            f"{model!r} at {size!r}: models are {', '.join(SUBJECTS)}, sizes {', '.join(SIZES)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    for drawn in draw(model, size, budget, limit_s=limit_s, seed=seed, out=out):
        typer.echo(f"drawn {drawn}")
    if comparison is not None:
        found = Comparison.load(comparison)
        path = out / f"pareto_{model}.png"
        plot_pareto(found, path)
        typer.echo(f"drawn {path}")
        if any(measured_point(row) for row in found.rows):
            path = out / f"pareto_measured_{model}.png"
            plot_pareto(found, path, measured=True)
            typer.echo(f"drawn {path}")


def draw(
    model: str, size: Size, budget: float, *, limit_s: float, seed: int, out: Path
) -> tuple[Path, Path]:
    """Plan a model at a share of its unplanned peak, and draw the plan."""
    subject = SUBJECTS[model](size)
    device = "meta" if size == "paper" else "cpu"
    built, sample = subject.build(device), subject.sample(device=device)
    options = {"loss_fn": subject.loss_fn, "time_limit_s": limit_s, "seed": seed}
    free = optimize(built, sample, budget_bytes=10**15, **options)
    peak_bytes = replay(free.graph, Schedule.keep_all(free.graph)).peak_bytes
    plan = optimize(built, sample, budget_bytes=int(budget * peak_bytes), **options)
    about = f"{model}, {subject.description}"
    memory, layers = out / f"memory_{model}.png", out / f"layers_{model}.png"
    plot_memory(plan, memory, title=f"Memory over one step: {about}")
    plot_layers(plan, layers, title=f"What is saved, what is recomputed: {about}")
    return memory, layers


if __name__ == "__main__":
    app()
