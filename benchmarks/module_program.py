"""PyTorch's own integer program over modules, beside our plans at the peaks that it reaches.

    python -m benchmarks.module_program gpt2 bert llama --budgets 90%,70%,50%

The program chooses at each budget (a share of eager's predicted peak). What it chose runs on the
model, and its peak is measured; its overhead is that of the captured step with its checkpoints,
by the same replay and the same times as all else here. Ours is planned at its measured peak.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import nn

from graph_capture import capture
from graph_capture.cost_graph import CostGraph
from graph_capture.recording.recorder import Recorder
from graph_capture.tracing import trace
from graph_capture.units import format_bytes
from planner import InfeasibleBudgetError, measure, optimize
from planner.comparing.execution.run_peer import peers_warnings
from planner.comparing.peers import PEER_ERRORS, PEERS, Situation
from solvers.replay import replay
from solvers.schedule import Schedule

from .models.registry import SUBJECTS
from .models.subject import Subject

HEADER = (
    *("model", "budget", "it believes in", "its peak", "its overhead", "modules"),
    *("our peak there", "our overhead", "gap"),
)


def rows_of(subject: Subject, budgets: list[float], time_limit_s: float) -> list[tuple[str, ...]]:
    """A line for each budget."""
    model, sample = subject.build(), subject.sample()
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    eager = capture(model, sample)
    baseline = replay(eager, Schedule.keep_all(eager))
    beside = [s for s in eager.storages if s.producer is None and s.category != "parameter"]
    rows = []
    for share in budgets:
        situation = Situation(
            sample_input=sample,
            loss_fn=None,
            device=torch.device("cpu"),
            blocks=lambda: (),
            budget_bytes=int(share * baseline.peak_bytes),
            beside_bytes=sum(s.size_bytes for s in beside),
        )
        start = (subject.name, f"{share:.0%}, {format_bytes(situation.budget_bytes or 0)}")
        try:
            with (
                peers_warnings(),
                PEERS["sac_ilp"].prepare(copy.deepcopy(model), situation) as ready,
            ):
                peak_bytes = measure(ready.model, sample, repeats=0).peak_bytes
                graph = with_checkpoints(ready.model, sample)
        except PEER_ERRORS as error:
            rows.append((*start, str(error)))
            continue
        overhead = replay(graph, Schedule.keep_all(graph)).cost_ns / baseline.cost_ns - 1
        believed = ready.note.split("believes in ")[1].split(";")[0]
        num_modules = ready.setting.split(", ")[1].split()[0]
        theirs = (believed, format_bytes(peak_bytes), f"{overhead:.2%}", num_modules)
        rows.append((*start, *theirs, *_ours(subject, peak_bytes, time_limit_s)))
    return rows


def with_checkpoints(model: nn.Module, sample: Any) -> CostGraph:
    """The step with the model's own checkpoints, as PyTorch runs it."""
    with (
        mock.patch.object(trace, "checkpoints_inlined", contextlib.nullcontext),
        # A checkpoint puts the generator back in backward, which a plan could not follow.
        mock.patch.object(Recorder, "check_generators", return_value=None),
    ):
        return capture(model, sample)


def _ours(subject: Subject, peak_bytes: int, time_limit_s: float) -> tuple[str, ...]:
    """Our plan within as many bytes: measured peak, overhead, gap."""
    model, sample = subject.build(), subject.sample()
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    try:
        plan = optimize(model, sample, budget=f"{peak_bytes}B", time_limit_s=time_limit_s)
    except InfeasibleBudgetError as error:
        return (f"nothing: {error}",)
    plan.apply(model)
    own_bytes = measure(model, sample, repeats=0).peak_bytes
    return format_bytes(own_bytes), f"{plan.overhead:.2%}", f"{plan.gap:.2%}"


def main(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(SUBJECTS))] = None,
    budgets: Annotated[str, typer.Option(help="shares of eager's peak")] = "90%,70%,50%",
    size: Annotated[str, typer.Option(help="tiny or record")] = "record",
    time_limit_s: Annotated[float, typer.Option(help="for each of our plans")] = 30.0,
) -> None:
    """Print a table in Markdown, line by line."""
    torch.set_num_threads(1)
    shares = [float(part.strip().rstrip("%")) / 100 for part in budgets.split(",")]
    typer.echo(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for name in names or ["gpt2", "bert", "llama"]:
        for row in rows_of(SUBJECTS[name](size), shares, time_limit_s):  # type: ignore[arg-type]
            typer.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    typer.run(main)
