"""Compare one model in a separate process: read a job, write files, report progress.

``python -m benchmarks.compare.worker JOB`` where ``JOB`` is JSON. Lines on stdout say
which part begins. ``NAME.json`` and ``NAME.csv`` (the comparison),
``NAME_settled.json``, ``NAME_matched.json`` and the figures go into the job's folder,
each as soon as it is known.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from graph_capture.cost_graph import CostGraph
from graph_capture.costs.profile import Profile
from graph_capture.costs.resolve import CostModelChoice
from planner import compare
from planner.base.atomic_write import write_whole
from planner.base.solve_options import SolveOptions
from planner.base.step_spec import StepSpec
from planner.comparing.budgets import AskedBudget
from planner.comparing.comparison import Comparison
from planner.comparing.events import ComparisonEvent
from planner.comparing.execution.execute import (
    runner_of,
    with_schedule,
)
from planner.comparing.execution.runner import Execution
from planner.comparing.predict import Predictor
from planner.comparing.strategy_choice import (
    choose_strategies,
    with_min_cut,
)
from planner.planning.captured_call import (
    CapturedCall,
    captured_call,
)
from planner.planning.known_least import known_least_memory
from solvers.replay import Replay, replay
from solvers.result import OPTIMAL_GAP
from solvers.schedule import Schedule
from solvers.strategies.registry import STRATEGIES
from solvers.strategies.strategy import StrategyError, apply_strategy

from ..models import SUBJECTS
from ..models.subject import Size, Subject
from ..worker import warm_up
from .match_peak_and_time import (
    RIVALS,
    MatchedRow,
    match_peak_and_time,
)
from .paired_runs import (
    NUM_PAIRS,
    PairedRun,
    paired_runs,
)
from .solve_at_peaks import (
    SolvedAtPeak,
    solve_at_peaks,
)

WORKERS = 2
"""Of each solve."""


CostModelName = Literal["roofline", "profile"]
COST_MODELS: tuple[CostModelName, ...] = get_args(CostModelName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to compare.

    Parameters
    ----------
    model, size
        As in ``benchmarks.models.SUBJECTS``.
    execute
        Whether schedules and peers run; otherwise everything is only predicted.
    strategies, peers
        Names; ``None`` for all strategies.
    num_budgets
        Evenly from the least peak to the unplanned one, both included; the rivals' own
        peaks are added.
    optimizer
        A name that ``optimize`` knows, or ``None``.
    cost_model
        Where predicted times come from, as for ``optimize``.
    repeats
        Timed pairs of steps.
    with_solved_at_peak
        Whether to solve ours at the peaks of others' points that the budgets leave open.
    with_matched
        Whether to compare ours with the rivals at their own peaks and costs.
    with_paired_runs
        Whether others' schedules run in turn with ours, see :mod:`.paired_runs`.
    only_paired_runs
        Whether nothing else is done; the comparison is already in the folder.
    threads
        Of PyTorch's kernels.
    limit_s
        Of each solve.
    out
        Folder.
    """

    model: str
    size: Size = "record"
    execute: bool = True
    strategies: tuple[str, ...] | None = None
    peers: tuple[str, ...] = ()
    num_budgets: int = 7
    optimizer: str | None = None
    cost_model: CostModelName = "roofline"
    repeats: int = 8
    with_solved_at_peak: bool = True
    with_matched: bool = True
    with_paired_runs: bool = True
    only_paired_runs: bool = False
    threads: int = 1
    limit_s: float = 30.0
    seed: int = 0
    out: str = "build/compare"


_PAIRED_RUNS = "_duels.json"
_LEFT = (
    ".json",
    ".csv",
    "_settled.json",
    "_matched.json",
    _PAIRED_RUNS,
    "_predicted.png",
    "_measured.png",
    "_accuracy.png",
)


def files_of(job: Job) -> tuple[Path, ...]:
    """All files that a job may write, whether they exist or not."""
    ends = (_PAIRED_RUNS,) if job.only_paired_runs else _LEFT
    return tuple(Path(job.out) / f"{job.model}{end}" for end in ends)


def work(job: Job) -> None:
    """Compare, and write the files.

    Times by profile are measured again and cached for this job only, so that an earlier
    run's times on a busy machine do not count.

    Raises
    ------
    ValueError
        When the model is unknown.
    """
    folder = Path(job.out)
    known = None
    if job.only_paired_runs:
        known = Comparison.load(folder / f"{job.model}.json")
        job = as_compared(job, known)
    torch.set_num_threads(job.threads)
    if job.model not in SUBJECTS:
        raise ValueError(f"unknown model {job.model!r}; known are {', '.join(SUBJECTS)}")
    warm_up("auto")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache_dir:
        step = Step.captured(job, Profile(cache_dir=cache_dir))
        if known is not None:
            predictor = predictor_of(step, job)
            write_rows(
                folder / f"{job.model}{_PAIRED_RUNS}", paired_runs_of(known, step, predictor, job)
            )
        else:
            compare_step(step, job, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A subject's step, captured with the costs of the job."""

    subject: Subject
    spec: StepSpec
    call: CapturedCall
    baseline: Replay

    @classmethod
    def captured(cls, job: Job, profile: Profile) -> Step:
        """The step of a job; ``profile`` prices it where the job asks for one."""
        say("capture")
        subject = SUBJECTS[job.model](job.size)
        model, sample = subject.build(seed=job.seed), subject.sample(job.seed)
        costs: CostModelChoice = profile if job.cost_model == "profile" else job.cost_model
        spec = StepSpec(
            model=model,
            sample_input=sample,
            loss_fn=subject.loss_fn,
            optimizer=job.optimizer,
            cost_model=costs,
        )
        with captured_call(spec) as call:
            unplanned = call.captured.unplanned
        assert unplanned is not None
        return cls(
            subject=subject,
            spec=spec,
            call=call,
            baseline=replay(unplanned, Schedule.keep_all(unplanned)),
        )

    @property
    def graph(self) -> CostGraph:
        """That schedules are of."""
        return self.call.captured.graph


def as_compared(job: Job, comparison: Comparison) -> Job:
    """The job with everything else that the comparison's figures depend on.

    Raises
    ------
    ValueError
        When a job cannot have its costs.
    """
    for known in COST_MODELS:
        if comparison.cost_model == known:
            return replace(
                job,
                cost_model=known,
                optimizer=comparison.optimizer or None,
                threads=comparison.num_threads or job.threads,
                limit_s=comparison.time_limit_s or job.limit_s,
                seed=comparison.seed,
            )
    raise ValueError(f"times by {comparison.cost_model!r} cannot be had again here")


def compare_step(step: Step, job: Job, folder: Path) -> None:
    """Do everything that a job can ask for, and write each file as soon as it is known."""
    subject, graph = step.subject, step.graph
    begin_s = time.monotonic()
    budgets = budgets_of(step, job)
    searched_s = time.monotonic() - begin_s  # the least peak is cached
    comparison = compare(
        step.spec.model,
        step.spec.sample_input,
        budgets=budgets,
        strategies=job.strategies,
        peers=job.peers if job.execute else (),
        loss_fn=subject.loss_fn,
        optimizer=job.optimizer,
        cost_model=step.spec.cost_model,
        measure=job.execute,
        repeats=job.repeats,
        time_limit_s=job.limit_s,
        seed=job.seed,
        workers=WORKERS,
        name=f"{subject.name} ({subject.description})",
        progress=say_event,
    )
    comparison = replace(comparison, least_solve_s=comparison.least_solve_s or searched_s)
    comparison.save(folder / f"{job.model}.json")
    comparison.save(folder / f"{job.model}.csv")
    say("figures")
    comparison.plot_pareto(folder / f"{job.model}_predicted.png")
    if job.execute:
        comparison.plot_pareto(folder / f"{job.model}_measured.png", measured=True)
        comparison.plot_predicted(folder / f"{job.model}_accuracy.png")
    predictor = predictor_of(step, job)
    if job.with_solved_at_peak:
        write_rows(folder / f"{job.model}_settled.json", solve_at_peaks(comparison, predictor, say))
    if job.with_matched:
        rows = [
            match_peak_and_time(graph, name, least=predictor.least, solved=predictor.solved)
            for name in RIVALS
        ]
        write_rows(folder / f"{job.model}_matched.json", rows)
    if job.execute and job.with_paired_runs:
        write_rows(
            folder / f"{job.model}{_PAIRED_RUNS}", paired_runs_of(comparison, step, predictor, job)
        )


def predictor_of(step: Step, job: Job) -> Predictor:
    """A predictor that solves as the comparison did, but to the gap that counts as optimal.

    A solve that ends at the comparison's gap may be above another's point by that much,
    and would decide nothing.
    """
    return Predictor(
        step.graph,
        step.baseline.cost_ns / 1e3,
        known_least_memory(step.graph, job.seed),
        SolveOptions(time_limit_s=job.limit_s, gap=OPTIMAL_GAP, seed=job.seed, workers=WORKERS),
    )


def paired_runs_of(
    comparison: Comparison, step: Step, predictor: Predictor, job: Job
) -> list[PairedRun]:
    """Others' schedules in turn with ours."""
    unplanned_bytes = step.baseline.peak_bytes
    execution = Execution(spec=step.spec, repeats=NUM_PAIRS, seed=job.seed)
    with runner_of(step.call, execution, unplanned_bytes) as (runner, plan):
        return paired_runs(
            comparison,
            predictor,
            with_min_cut(choose_strategies(None, STRATEGIES)[0], step.call.captured),
            lambda theirs, ours: runner.in_turn(
                with_schedule(plan, theirs), with_schedule(plan, ours)
            ),
            say,
        )


def write_rows(path: Path, rows: Sequence[SolvedAtPeak | MatchedRow | PairedRun]) -> None:
    """Dataclasses as a JSON list."""
    write_whole(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def budgets_of(step: Step, job: Job) -> list[AskedBudget]:
    """Evenly from the least peak to the unplanned one, and the rivals' own peaks by name."""
    least_bytes = known_least_memory(step.graph, job.seed).peak_bytes
    span = max(0, step.baseline.peak_bytes - least_bytes)
    parts = max(1, job.num_budgets - 1)
    even = sorted({least_bytes + span * i // parts for i in range(job.num_budgets)})
    # As text, because a bare number is easily read in another unit.
    return [
        *(f"{num_bytes}B" for num_bytes in even),
        *(name for name in RIVALS if _applies(name, step.graph)),
    ]


def _applies(name: str, graph: CostGraph) -> bool:
    try:
        apply_strategy(STRATEGIES[name], graph)
    except StrategyError:
        return False
    return True


def say_event(event: ComparisonEvent) -> None:
    """Say that a part of the comparison begins."""
    say(f"{event.num_done}/{event.num_parts} {event.message}")


def say(what: str) -> None:
    """Write a line for the parent process."""
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def job_of(text: str) -> Job:
    """The job that :func:`dataclasses.asdict` and JSON made ``text`` of."""
    data: dict[str, Any] = json.loads(text)
    for name in ("strategies", "peers"):
        if data[name] is not None:
            data[name] = tuple(data[name])
    return Job(**data)


if __name__ == "__main__":
    work(job_of(sys.argv[1]))
