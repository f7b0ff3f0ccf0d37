"""The command that compares strategies: ``remat compare``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from solvers.strategies import STRATEGIES, Strategy, register_strategy
from solvers.strategies.registry import Registry

from ..comparing.compare import compare
from ..comparing.comparison import Comparison
from ..comparing.files import to_json
from ..errors import CaptureError
from ..plots.style import check_matplotlib
from .answers import Answer, AsJson, ExitCode, command, fail, say_error
from .arguments import (
    Around,
    Autocast,
    CostModelName,
    DeviceName,
    GradsWord,
    OptimizerName,
    OutputsWord,
    Resident,
    Target,
    check_file,
    load_object,
    load_target,
    read_autocast,
    read_holds,
    read_names,
)


@command
def compare_command(
    target: Target,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="e.g. 80%,0.6,12GB,transformers_per_layer: shares of the unplanned peak, bytes, "
            "or the peak of a strategy; else eight, evenly from the least possible up"
        ),
    ] = None,
    strategies: Annotated[
        str | None, typer.Option(help=f"names; else all of {', '.join(STRATEGIES)}, min_cut")
    ] = None,
    strategy_from: Annotated[
        list[str] | None,
        typer.Option(
            help="module:function of a graph and a budget that returns a schedule; takes part "
            "beside the others; repeatable"
        ),
    ] = None,
    peers: Annotated[str, typer.Option(help="other tools to run, by name")] = "",
    compiled_ratios: Annotated[
        str,
        typer.Option(
            help="e.g. 0.9,0.3: the same step compiled, without a budget, at these of PyTorch's "
            "activation memory budgets, and by ours at their peaks; takes minutes, CPU only"
        ),
    ] = "",
    lower: Annotated[
        str, typer.Option(help="what compiled steps are compiled with: inductor or aot_eager")
    ] = "inductor",
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--no-measure", help="run the schedules; else where that can be"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="pairs of steps that are timed")] = 8,
    optimizer: OptimizerName = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    cost_model: CostModelName = "roofline",
    outputs: OutputsWord = "held",
    grads: GradsWord = "none",
    resident: Resident = "0",
    distributed: Around = None,
    time_limit_s: Annotated[float, typer.Option(help="for each solve")] = 30.0,
    gap: Annotated[float, typer.Option(help="stop when proven to be this near the least time")] = (
        0.001
    ),
    seed: Annotated[int, typer.Option()] = 0,
    name: Annotated[str | None, typer.Option(help="of the model, in tables and figures")] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="write the table to this .json or .csv; repeatable")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="draw the figures into this folder")] = None,
    as_json: AsJson = False,
) -> Answer:
    """Hold rematerialization strategies against each other on one training step."""
    dtype = read_autocast(autocast)
    files = out or []
    for path in files:
        if path.suffix.lower() not in (".json", ".csv"):
            fail(f"--out is a .json or .csv file, got {path}")
        check_file("--out", path)
    if plots is not None:
        try:
            check_matplotlib()
        except ImportError as error:
            fail(f"--plots: {error}")
        _check_folder(plots)
    names = read_names(strategies)
    registry, added = _extended(strategy_from or [])
    if names is not None:
        names = (*names, *(name for name in added if name not in names))
    model, sample_input, loss_fn = load_target(target)
    try:
        found = compare(
            model,
            sample_input,
            budgets=read_names(budgets),
            strategies=names,
            peers=read_names(peers or None) or (),
            compiled_ratios=_ratios(compiled_ratios),
            lower=lower,  # type: ignore[arg-type]  # checked there
            registry=registry,
            loss_fn=loss_fn,
            optimizer=optimizer,
            device=device,
            autocast=dtype,
            cost_model=cost_model,
            **read_holds(outputs, grads, resident, distributed),
            measure=measure,
            repeats=repeats,
            time_limit_s=time_limit_s,
            gap=gap,
            seed=seed,
            name=name,
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, ValueError) as error:
        say_error(error)
    # Hours of work may be in it: every file is tried, and whatever fails, the table is shown.
    said, failed = [], []
    for path in files:
        try:
            found.save(path)
            said.append(f"written to {path}")
        except (OSError, ValueError) as error:
            failed.append(f"{path}: {error}")
    if plots is not None:
        try:
            said += _drawn(found, plots)
        except (OSError, ImportError, ValueError) as error:  # ValueError: nothing to draw
            failed.append(str(error))
    return Answer(
        text=str(found),
        data=json.loads(to_json(found)),
        said=said,
        failure="; ".join(failed),
        code=ExitCode.FAILED if failed else ExitCode.DONE,
    )


def _ratios(text: str) -> tuple[float, ...]:
    """Read ratios, or end the command."""
    try:
        return tuple(float(part) for part in read_names(text or None) or ())
    except ValueError:
        fail(f"--compiled-ratios are numbers from 0 to 1, such as 0.9,0.3, got {text!r:.100}")


def _check_folder(folder: Path) -> None:
    """End the command where nothing could be written into a folder, which may yet be made."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        fail(f"--plots is a folder, and {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        fail(f"--plots: nothing can be written into {there}")


def _extended(sources: list[str]) -> tuple[Registry, list[str]]:
    """Return the registry with the user's own functions, and their names."""
    registry: Registry = STRATEGIES
    added = []
    for source in sources:
        found = load_object(source)
        if not callable(found) and not isinstance(found, Strategy):
            fail(f"{source} is neither a function nor a strategy")
        try:
            extended = register_strategy(found, registry)
        except ValueError as error:
            fail(f"{source}: {error}")
        added += [name for name in extended if name not in registry]
        registry = extended
    return registry, added


def _drawn(found: Comparison, folder: Path) -> list[str]:
    """Draw what there is; says of each figure where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    found.plot_pareto(folder / "pareto.png")
    said = [f"drawn {folder / 'pareto.png'}"]
    ran = [row.measured for row in found.rows if row.kind == "strategy" and row.measured]
    if any(step.num_pairs for step in ran):
        found.plot_pareto(folder / "pareto_measured.png", measured=True)
        said.append(f"drawn {folder / 'pareto_measured.png'}")
    if ran:
        found.plot_predicted(folder / "predicted.png")
        said.append(f"drawn {folder / 'predicted.png'}")
    if found.compiled is not None and any(r.time_ratio for r in found.compiled.rows):
        found.plot_compiled(folder / "compiled.png")
        said.append(f"drawn {folder / 'compiled.png'}")
    return said
