"""Survey or plan a step in a separate process: read a job, write JSON lines.

A survey captures the step and reports the range of its budgets: the resident bytes, the
least peak of any schedule, and the peak when nothing is recomputed.
A plan is one call of :func:`planner.optimize`, timed from outside and including the
search for the least memory. Before it, the process has planned only a small chain, so
that everything that compiles on first use is compiled.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import LossOnly, Sample, build, num_parameters
from benchmarks.worker import warm_up
from graph_capture.calls.autocast import autocast_as
from graph_capture.calls.call_spec import bind_call, split_sample, tensors_of
from graph_capture.costs.target import target_of
from graph_capture.loop.optimizer_step import measure_optimizer
from graph_capture.step_capture import capture_step
from planner import InfeasibleBudgetError, frontier, optimize
from planner.optimize import Granularity
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory

LEAST_MEMORY_LIMIT_S = 20.0
FRONTIER_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker does.

    Parameters
    ----------
    model
        A key of ``shapes.SHAPES``.
    weights
        Their dtype, e.g. ``"bfloat16"``.
    autocast
        The dtype of autocast, or ``None``.
    device
        As in ``optimize``; ``None`` for the CPU.
    layers
        Number of layers instead of the published one.
    options
        Options of the configuration, instead of the published ones.
    lies_on
        Where the weights are made: ``"meta"`` or ``"cpu"``.
    headroom
        As in ``optimize``.
    loss_only
        Whether a text model returns its loss and not its logits.
    survey
        Whether to report the range of budgets.
    budgets_bytes
        Budgets to plan at, one after another.
    granularity
        As in ``optimize``.
    frontier
        At how many budgets to plan from one capture; 0 for none.
    """

    model: str
    batch: int
    sequence: int
    weights: str = "float32"
    autocast: str | None = None
    optimizer: str | None = "adamw"
    device: str | None = None
    layers: int | None = None
    options: dict[str, Any] | None = None
    lies_on: str = "meta"
    limit_s: float = 60.0
    seed: int = 0
    headroom: float | None = 0.0
    loss_only: bool = False
    survey: bool = False
    budgets_bytes: tuple[int, ...] = ()
    granularity: Granularity = "step"
    frontier: int = 0

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.autocast is None else getattr(torch, self.autocast)


def work(job: Job) -> Iterator[dict[str, Any]]:
    """Yield a job's results: ``{"survey": …}``, ``{"plan": …}`` by budget, ``{"frontier": …}``."""
    begin_s = time.perf_counter()
    model, sample = build(
        job.model,
        batch=job.batch,
        sequence=job.sequence,
        dtype=getattr(torch, job.weights),
        layers=job.layers,
        options=job.options,
        device=job.lies_on,
    )
    if job.loss_only:
        model = LossOnly(model).train()
    build_s = time.perf_counter() - begin_s
    if job.survey:
        yield {"survey": {"build_s": build_s, **survey(job, model, sample)}}
    for budget_bytes in job.budgets_bytes:
        yield {"plan": plan_at(job, model, sample, budget_bytes)}
    if job.frontier:
        yield {"frontier": frontier_of(job, model, sample)}


def survey(job: Job, model: torch.nn.Module, sample: Sample) -> dict[str, Any]:
    """Sizes of a step, and the time to find them."""
    arguments = bind_call(model.forward, *split_sample(sample))
    target = target_of(model, tensors_of(arguments), job.device)
    watch = _Watch()
    with autocast_as(target.torch_type, job.autocast_dtype):
        optimizer = measure_optimizer(job.optimizer, model, target)
        watch.lap("optimizer_s")
        captured = capture_step(
            model, arguments, optimizer=optimizer, forward=model.forward, target=target
        )
        watch.lap("capture_s")
    least = least_memory(captured.graph, time_limit_s=LEAST_MEMORY_LIMIT_S, seed=job.seed)
    watch.lap("least_memory_s")
    assert captured.unplanned is not None
    assert captured.costs is not None
    return {
        "num_parameters": num_parameters(model),
        "num_operators": captured.graph.num_operators,
        "resident_bytes": captured.graph.resident_bytes,
        "least_bytes": least.peak_bytes,
        "least_bound_bytes": least.lower_bound_bytes,
        "keep_all_bytes": keep_all_peak_bytes(captured.graph),
        "unplanned_bytes": keep_all_peak_bytes(captured.unplanned),
        "costs": f"{captured.costs.model} for {captured.costs.device}",
        **watch.laps,
        "max_rss_bytes": max_rss_bytes(),
    }


def plan_at(job: Job, model: torch.nn.Module, sample: Sample, budget_bytes: int) -> dict[str, Any]:
    """One call of ``optimize``, and what its plan says; or why there is none."""
    watch = _Watch()
    try:
        plan = optimize(
            model,
            sample,
            budget_bytes=budget_bytes,
            optimizer=job.optimizer,
            time_limit_s=job.limit_s,
            seed=job.seed,
            device=job.device,
            headroom=job.headroom,
            autocast=job.autocast_dtype,
            granularity=job.granularity,
        )
    except InfeasibleBudgetError as error:
        watch.lap("optimize_s")
        return {
            "status": "infeasible",
            "budget_bytes": budget_bytes,
            "min_budget_bytes": error.min_budget_bytes,
            "lower_bound_bytes": error.lower_bound_bytes,
            "why": str(error),
            **watch.laps,
            "max_rss_bytes": max_rss_bytes(),
        }
    watch.lap("optimize_s")
    words = str(plan)
    watch.lap("report_s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        watch.lap("save_s")
        file_bytes = path.stat().st_size
        type(plan).load(path)
        watch.lap("load_s")
    return {
        "status": str(plan.status),
        "budget_bytes": budget_bytes,
        "headroom_bytes": plan.headroom_bytes,
        "peak_bytes": plan.predicted_peak_bytes,
        "unplanned_bytes": plan.baseline_peak_bytes,
        "overhead": plan.overhead,
        "lower_bound_us": plan.lower_bound_us,
        "step_us": plan.predicted_step_us,
        "unplanned_us": plan.baseline_step_us,
        "gap": plan.gap,
        "bound_scope": plan.bound_scope,
        "solver": plan.solver,
        "solve_s": plan.solve_s,
        "num_recomputed": sum(plan.schedule.recomputed().values()),
        "file_bytes": file_bytes,
        "log": list(plan.log),
        "report": words,
        **watch.laps,
        "max_rss_bytes": max_rss_bytes(),
    }


def frontier_of(job: Job, model: torch.nn.Module, sample: Sample) -> dict[str, Any]:
    """One call of ``frontier``, and its figures."""
    watch = _Watch()
    found = frontier(
        model,
        sample,
        budgets=job.frontier,
        granularity=job.granularity,
        optimizer=job.optimizer,
        device=job.device,
        headroom=job.headroom,
        autocast=job.autocast_dtype,
        time_limit_s=min(FRONTIER_LIMIT_S, job.limit_s),
        seed=job.seed,
    )
    watch.lap("frontier_s")
    return {**found.to_dict(), **watch.laps, "max_rss_bytes": max_rss_bytes(), "report": str(found)}


def max_rss_bytes() -> int:
    """The peak memory of this process so far, plus that of its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB on Linux
    return unit * sum(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


class _Watch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._begin_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now_s = time.perf_counter()
        self.laps[name] = now_s - self._begin_s
        self._begin_s = now_s


def to_json(job: Job) -> str:
    return json.dumps(asdict(job))


def from_json(text: str) -> Job:
    data = json.loads(text)
    return Job(**{**data, "budgets_bytes": tuple(data["budgets_bytes"])})


def main() -> None:
    """Read a job from standard input, and write a line for each result."""
    job = from_json(sys.stdin.read())
    warm_up("auto")
    for result in work(job):
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
