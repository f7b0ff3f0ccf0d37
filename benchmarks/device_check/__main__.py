"""The command: ``make gpu-check``, or ``python -m benchmarks.device_check --help``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.panel import Panel

from planner.comparing.peers import PEER_ERRORS

from .bench import Bench, Where, release
from .bits import check_bits
from .environment import (
    OWED,
    environment,
    lines,
)
from .memory import check_planned, check_unplanned
from .overhead import COST_MODELS, check_overhead
from .peers import check_peers
from .portable import check_portable
from .results import Failed, Results
from .subjects import SUBJECTS, Size, subjects
from .tables import headroom_line, markdown, sections

SHARES = (0.8, 0.6, 0.4)
BITS_AT = (0.6, "least")
OVERHEAD_AT = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of a run; see ``--help``."""

    size: Size
    seed: int
    time_limit_s: float
    num_steps: int
    num_pairs: int
    deterministic: bool
    compile_budgets: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a check that can fail by itself.

    Parameters
    ----------
    name
        For errors.
    run
        Returns rows of the check's results.
    """

    name: str
    run: Callable[[], list[Any]]


def _portable(bench: Bench, settings: Settings) -> list[Part]:
    return [Part(name="", run=lambda: [check_portable(bench)])]


def _memory(bench: Bench, settings: Settings) -> list[Part]:
    unplanned = Part(name="unplanned", run=lambda: [check_unplanned(bench)])
    return [unplanned, *(_memory_at(bench, where) for where in (*SHARES, "least"))]


def _memory_at(bench: Bench, where: Where) -> Part:
    return Part(name=f"at {where}", run=lambda: [check_planned(bench, where)])


def _bits(bench: Bench, settings: Settings) -> list[Part]:
    return [_bits_at(bench, settings, where) for where in BITS_AT]


def _bits_at(bench: Bench, settings: Settings, where: Where) -> Part:
    return Part(
        name=f"at {where}",
        run=lambda: check_bits(
            bench, where, num_steps=settings.num_steps, deterministic=settings.deterministic
        ),
    )


def _overhead(bench: Bench, settings: Settings) -> list[Part]:
    pricing = [_priced_by(bench, name) for name in COST_MODELS]
    return [*pricing, *(_overhead_by(bench, settings, name) for name in COST_MODELS)]


def _priced_by(bench: Bench, cost_model: str) -> Part:
    """A part of its own, so that if a cost model fails, the other's predictions remain."""

    def run() -> list[Any]:
        bench.unplanned(cost_model)
        return []

    return Part(name=f"priced by {cost_model}", run=run)


def _overhead_by(bench: Bench, settings: Settings, planned_by: str) -> Part:
    def run() -> list[Any]:
        if not bench.knows(planned_by):
            return []
        row = check_overhead(
            bench,
            OVERHEAD_AT,
            planned_by=planned_by,
            priced_by=tuple(name for name in COST_MODELS if bench.knows(name)),
            num_pairs=settings.num_pairs,
        )
        return [row]

    return Part(name=f"planned by {planned_by}", run=run)


def _peers(bench: Bench, settings: Settings) -> list[Part]:
    return [
        Part(
            name="",
            run=lambda: check_peers(
                bench, compile_budgets=settings.compile_budgets, num_pairs=settings.num_pairs
            ),
        )
    ]


CHECKS: dict[str, Callable[[Bench, Settings], list[Part]]] = {
    "portable": _portable,
    "memory": _memory,
    "bits": _bits,
    "overhead": _overhead,
    "peers": _peers,
}
"""By the name of their rows in :class:`Results`."""

TIME_LIMIT_S: dict[Size, float] = {"full": 20.0, "small": 15.0, "tiny": 5.0}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    size: Annotated[
        str | None,
        typer.Option(help="full (80 GB), small (16 to 24 GB) or tiny; by default what fits"),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help=f"some of {', '.join(SUBJECTS)}; all by default")
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option(help=f"some of {', '.join(CHECKS)}; all by default")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; by default cuda where there is one")
    ] = None,
    seed: Annotated[int, typer.Option(help="of weights and inputs", min=0)] = 0,
    time_limit_s: Annotated[
        float | None, typer.Option(help="of each solve; by default by the size", min=0.1)
    ] = None,
    steps: Annotated[int, typer.Option(help="whose bits are compared", min=1)] = 3,
    pairs: Annotated[int, typer.Option(help="of timed steps", min=2)] = 12,
    deterministic: Annotated[
        bool, typer.Option(help="compare bits under deterministic algorithms from the start")
    ] = False,
    compile_budget: Annotated[
        list[float] | None,
        typer.Option(help="of torch.compile's activation_memory_budget; 1 and 0.5 by default"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="of the CPU's kernels; by default 1 where it is the device")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for JSON and markdown")] = Path(
        "build/gpu-check"
    ),
) -> None:
    """Check predictions and bits on a device, and compare with what people use today."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    where = _device(device)
    chosen = _size(size, where)
    names = _known("check", check, CHECKS)
    settings = Settings(
        size=chosen,
        seed=seed,
        time_limit_s=TIME_LIMIT_S[chosen] if time_limit_s is None else time_limit_s,
        num_steps=steps,
        num_pairs=pairs,
        deterministic=deterministic,
        compile_budgets=tuple(compile_budget or (1.0, 0.5)),
    )
    if threads is not None or where.type == "cpu":
        torch.set_num_threads(threads or 1)
    results = Results(environment=environment(where, asdict(settings)))
    out.mkdir(parents=True, exist_ok=True)
    _announce(console, results)
    for subject in subjects(chosen, tuple(_known("model", model, SUBJECTS))):
        results.subjects[subject.name] = subject.words
        _run(console, results, Runner(subject=subject, device=where, names=names), settings, out)
    for section in sections(results):
        console.print(section.table())
    console.print(headroom_line(results))
    faults = results.faults()
    for fault in faults:
        console.print(f"[bold red]fault:[/] {fault}")
    console.print(f"written to {out}: results.json, results.md")
    _announce(console, results)
    raise typer.Exit(1 if faults else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """One model's turn: the model, its device and its checks."""

    subject: Any
    device: torch.device
    names: list[str]


def _run(console: Console, results: Results, runner: Runner, settings: Settings, out: Path) -> None:
    """Run every check of one model; failures are recorded, and the others go on."""
    subject = runner.subject
    try:
        bench = Bench(
            subject=subject,
            device=runner.device,
            seed=settings.seed,
            time_limit_s=settings.time_limit_s,
        )
    except PEER_ERRORS as error:
        results.failed.append(_failure(subject.name, "build", error))
        return
    for name in runner.names:
        started_s = time.monotonic()
        for part in CHECKS[name](bench, settings):
            try:
                getattr(results, name).extend(part.run())
            except PEER_ERRORS as error:
                results.failed.append(_failure(subject.name, f"{name} {part.name}".strip(), error))
            release(runner.device)
        console.print(f"{subject.label}: {name}, {time.monotonic() - started_s:.0f} s")
        results.write(out)
        (out / "results.md").write_text(markdown(results), encoding="utf-8")
    del bench
    release(runner.device)


def _failure(model: str, check: str, error: BaseException) -> Failed:
    return Failed(model=model, check=check, error=f"{type(error).__name__}: {error}"[:2000])


def _announce(console: Console, results: Results) -> None:
    console.print("\n".join(lines(results.environment)), highlight=False)
    if results.environment["owed"]:
        console.print(Panel(f"[bold]{OWED}[/]", border_style="red", title="No GPU"))


def _device(asked: str | None) -> torch.device:
    if asked not in (None, "cuda", "cpu"):
        raise typer.BadParameter(f"--device is cuda or cpu, got {asked!r}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no CUDA device here")
    kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    return (
        torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    )


def _size(asked: str | None, device: torch.device) -> Size:
    if asked is not None:
        if asked not in ("full", "small", "tiny"):
            raise typer.BadParameter(f"--size is full, small or tiny, got {asked!r}")
        return asked  # type: ignore[return-value]
    if device.type != "cuda":
        return "tiny"
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    return "full" if total_bytes > 75e9 else "small" if total_bytes > 15e9 else "tiny"


def _known(option: str, asked: list[str] | None, known: dict[str, Any]) -> list[str]:
    unknown = sorted(set(asked or ()) - known.keys())
    if unknown:
        raise typer.BadParameter(f"unknown {option} {unknown[0]!r}; known are {', '.join(known)}")
    return list(asked or known)


if __name__ == "__main__":
    app()
