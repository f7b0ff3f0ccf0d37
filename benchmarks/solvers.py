"""Solvers side by side: ``make bench-solvers``, or ``python -m benchmarks.solvers --help``.

Every solve runs alone, one after another, in a fresh process. Compiling and loading on
first use is not timed. Figures are those of this machine; the results' folder also
records the machine and the versions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from solvers.portfolio import SOLVERS

from .growth import Growth
from .instances import DEFAULT, find_instances
from .plots import plot_gaps, plot_growth, plot_profiles
from .report import table_of, write_runs
from .run import Run, best_costs, run

USUAL = (
    "auto",
    "slice_refinement",
    "local_search",
    "chain_dp",
    "uniform",
    "checkmate_milp",
    "moccasin",
)
"""Compared by default, if they exist."""

LAYERS = (6, 12, 24, 48, 96)

app = typer.Typer(
    help="Compare solvers on time to a schedule and time to a proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="folder for CSV, JSON and plots")]
Limit = Annotated[float, typer.Option(help="of each solve, in s", min=0.1)]
Seed = Annotated[int, typer.Option(help="of random instances and of solvers", min=0)]
Workers = Annotated[int, typer.Option(help="threads of a solve", min=1)]


@app.command()
def compare(
    instance: Annotated[
        list[str] | None,
        typer.Argument(
            help="JSON file, folder of them, or chain:F, layered:N, gpt2:L, bert:L; "
            f"by default {' '.join(DEFAULT)}",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="share of the keep-all peak; by default 0.9 and 0.7", show_default=False),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(help=f"by default those of {', '.join(USUAL)} that exist", show_default=False),
    ] = None,
    limit_s: Limit = 10.0,
    seed: Seed = 0,
    workers: Workers = 2,
    out: Out = Path("build/bench-solvers"),
) -> None:
    """Run solvers on instances at budgets: times to a schedule and to a proof, and gaps."""
    console = _console()
    names = list(solver or (name for name in USUAL if name in SOLVERS))
    _check(names)
    instances = _found(list(instance or DEFAULT), seed)
    budgets = list(budget or (0.9, 0.7))
    runs: list[Run] = []
    out.mkdir(parents=True, exist_ok=True)
    total = len(instances) * len(budgets) * len(names)
    for case in instances:
        for share in budgets:
            for name in names:
                with console.status(f"{len(runs)} of {total}: {case.name}, {share:g}, {name}"):
                    row = run(case, share, name, limit_s=limit_s, seed=seed, workers=workers)
                    runs.append(row)
    console.print(table_of(runs, f"{limit_s:g} s each, seed {seed}, {workers} workers"))
    console.print(_summary(runs))
    settings = {"limit_s": limit_s, "seed": seed, "workers": workers}
    write_runs(runs, out, settings)
    plot_profiles(runs, out / "profiles.png", limit_s)
    plot_gaps(runs, out / "gaps.png", limit_s)
    console.print(f"written to {out}")


@app.command()
def growth(
    family: Annotated[str, typer.Option(help="gpt2, bert or chain")] = "gpt2",
    layers: Annotated[
        list[int] | None,
        typer.Option(
            help=f"by default {', '.join(str(n) for n in LAYERS)}", min=2, show_default=False
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="share of the keep-all peak")] = 0.6,
    solver: Annotated[str, typer.Option()] = "auto",
    limit_s: Limit = 120.0,
    seed: Seed = 0,
    workers: Workers = 2,
    out: Out = Path("build/bench-growth"),
) -> None:
    """Time to a gap of 0.5 % and to a proof against the number of layers."""
    console = _console()
    _check([solver])
    out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[int, Run]] = []
    for num_layers in layers or LAYERS:
        with console.status(f"{family}:{num_layers}"):
            case = _found([f"{family}:{num_layers}"], seed)[0]
            row = run(case, budget, solver, limit_s=limit_s, seed=seed, workers=workers)
            rows.append((num_layers, row))
    grown = Growth(family=family, budget=budget, solver=solver, runs=tuple(rows))
    runs = [row for _, row in rows]
    console.print(table_of(runs, f"{limit_s:g} s each, seed {seed}, {workers} workers"))
    fits: dict[str, Any] = {}
    for mark, points in grown.marks().items():
        fit = grown.fit(mark)
        if fit is None:
            console.print(f"{mark}: {len(points)} sizes, no fit")
        else:
            fits[mark] = fit._asdict()
            console.print(
                f"{mark}: {fit.scale:.3g} s x layers^{fit.exponent:.2f}, {len(points)} sizes"
            )
    settings = {"limit_s": limit_s, "seed": seed, "workers": workers, "fits": fits}
    write_runs(runs, out, settings)
    plot_growth(grown, out / "growth.png")
    console.print(f"written to {out}")


def _console() -> Console:
    """As wide as the terminal; in a file or a pipe, as wide as the table."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _summary(runs: list[Run]) -> Table:
    """For each solver: in how many cases it was near the best, and had a proof."""
    best = best_costs(runs)
    table = Table(title="all cases")
    for name in ("solver", "cases", "within 1 %", "proven", "broken"):
        table.add_column(name, justify="left" if name == "solver" else "right")
    for solver in dict.fromkeys(row.solver for row in runs):
        own = [row for row in runs if row.solver == solver]
        near = [
            row for row in own if row.within_s(best.get((row.instance, row.budget))) is not None
        ]
        counts = (
            len(own),
            len(near),
            sum(row.proof_s is not None for row in own),
            sum(row.status == "broken" for row in own),
        )
        table.add_row(solver, *map(str, counts))
    return table


def _check(names: list[str]) -> None:
    unknown = sorted(set(names) - SOLVERS.keys())
    if unknown:
        raise typer.BadParameter(
            f"unknown solver {', '.join(unknown)}; known are {', '.join(sorted(SOLVERS))}"
        )


def _found(names: list[str], seed: int) -> list[Any]:
    try:
        return find_instances(names, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
