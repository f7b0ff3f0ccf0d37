"""Estimate a training step on a mesh of devices, before any of them is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.costs.target import target_of
from graph_capture.loop.loop_holds import Outputs
from graph_capture.loop.loss import LossFn
from solvers.pipeline import (
    SCHEDULES,
    PipelineRun,
    PipelineSchedule,
    StageTimes,
    calls_in_flight,
    simulate,
)

from ..base.budget import parse_headroom
from ..base.progress import ShowLines, showing_lines
from ..base.solve_options import DEFAULT_GAP, SolveOptions
from ..plan import Plan
from ..sizing.device_budget import budget_or_device
from ..sizing.estimate import positive_integers
from .around import Around
from .communication import rates
from .divided import divide_and_check
from .mesh import DataParallelKind, Mesh
from .mesh_report import MeshEstimate, StageEstimate
from .pipeline import on_meta, sample_on_meta, stage_of, stage_sample
from .rank_step import rank_step
from .tensor_parallel import Collectives, find_tp_plan


def estimate_mesh(
    model: nn.Module,
    sample_input: Mapping[str, Any],
    *,
    mesh: Mapping[str, int] | Mesh,
    num_microbatches: int | None = None,
    schedule: PipelineSchedule = "1f1b",
    data_parallel: DataParallelKind = "ddp",
    tp_plan: Mapping[str, str] | None = None,
    bandwidth_gb_per_s: Mapping[str, float] | None = None,
    budget: float | str | None = None,
    granularity: Literal["step", "blocks"] = "step",
    blocks: str | Sequence[str] = "auto",
    loss_fn: LossFn | None = None,
    optimizer: str | None = None,
    device: str | Device | None = None,
    autocast: torch.dtype | None = None,
    cost_model: CostModelChoice = "roofline",
    headroom: float | str | None = None,
    outputs: Outputs = "held",
    time_limit_s: float = 15.0,
    gap: float = DEFAULT_GAP,
    seed: int = 0,
    progress: ShowLines = None,
) -> MeshEstimate[Plan]:
    """Estimate what each rank of a mesh holds, computes and sends in a training step.

    One rank of each stage is captured as it is, with its own layers and its own part of each
    matrix, on stand-ins: nothing is allocated. Where its step does not fit, it is planned.

    Parameters
    ----------
    model
        In training mode, on any device or on ``meta``. With a ``pp`` axis it has to be a model of
        Transformers whose configuration names its pipeline's modules (``base_model_pp_plan``).
    sample_input
        One micro-batch of one data-parallel rank, by name.
    mesh
        Ranks of each axis: ``{"dp": 64, "tp": 8, "pp": 4}``; a missing one is 1.
    num_microbatches
        Of a step, for each data-parallel rank; needed where there are several stages.
    schedule
        ``"1f1b"`` or ``"gpipe"``: how many micro-batches a stage has in flight.
    data_parallel
        What is around each rank's modules where ``dp`` is above 1: ``"ddp"``, whose ranks hold all
        parameters; ``"fsdp2"``, whose ranks hold shards of them, for one stage that is planned in
        blocks.
    tp_plan
        How modules are divided among the ``tp`` ranks, by their paths (``*`` for a number):
        ``"colwise"``, ``"rowwise"``, ``"colwise_gather_output"``, ``"embedding_rowwise"``. ``None``
        for the one that the model carries, as Transformers' models do.
    bandwidth_gb_per_s
        What a rank can send on each axis, in one direction. ``None`` for data sheets of the device,
        where there are some (:data:`planner.mesh.communication.LINKS`).
    budget
        Of each rank, in GB or such as ``"70GiB"``; ``None`` for the device's memory.
    granularity, blocks, loss_fn, optimizer, device, autocast, cost_model, headroom, outputs
        As for :func:`planner.optimize`.
    time_limit_s
        For each stage's plan.
    gap, seed
        As for :func:`planner.optimize`.
    progress
        ``True`` shows what is being done; a function receives it line by line.

    Raises
    ------
    CaptureError
        When a rank's step cannot be captured.
    TypeError, ValueError
        When an argument is invalid, or the model cannot be divided as asked.

    Notes
    -----
    The times of links are those of data sheets, reached by no collective. Sums over tensor-parallel
    ranks hide behind nothing; those of data-parallel gradients behind the last micro-batch's
    backward; messages of a pipeline behind all but its first and last ones.
    """
    axes = Mesh.of(mesh)
    _check(axes, sample_input, data_parallel, granularity, schedule, num_microbatches)
    number = 1 if num_microbatches is None else num_microbatches
    options = SolveOptions(time_limit_s=time_limit_s, gap=gap, seed=seed)
    empty = on_meta(model)
    styles = find_tp_plan(empty, tp_plan) if axes.tp > 1 else {}
    common = {
        "loss_fn": loss_fn,
        "optimizer": optimizer,
        "device": device,
        "autocast": autocast,
        "cost_model": cost_model,
    }
    bind_call(model.forward, *split_sample(dict(sample_input)))
    target = target_of(empty, [], device)
    asked = budget_or_device(target, budget_gb=budget)
    if asked is not None and asked.num_bytes is None:
        raise ValueError(f"budget={budget!r} is a share of no one peak: write bytes such as '70GB'")
    room = None
    if asked is not None:
        assert asked.num_bytes is not None
        room = parse_headroom(headroom, asked.num_bytes, target.torch_type)
    speeds, source = rates(target.device.name, axes.tp, bandwidth_gb_per_s)
    found: list[StageEstimate[Plan]] = []
    hidden: torch.Tensor | None = None
    with showing_lines(progress) as say:
        for stage in range(axes.pp):
            say(f"stage {stage + 1} of {axes.pp}")
            own = stage_of(empty, stage, axes.pp)
            parts = {
                path.removeprefix(own.prefix): style
                for path, style in _in_stage(styles, own.prefix, own.module)
            }
            around = Around(
                mesh=axes,
                stage=stage,
                number=number,
                flying=calls_in_flight(schedule, stage, axes.pp, number),
                data_parallel=data_parallel,
                outputs=outputs,
                granularity=granularity,
                blocks=blocks,
            )
            sample = stage_sample(sample_on_meta(sample_input), hidden, stage, axes.pp)
            collectives = Collectives()
            if parts:
                collectives = divide_and_check(own.module, sample, parts, axes.tp, common)
            estimated, hidden = rank_step(
                own.module,
                sample,
                parts,
                collectives,
                around,
                common,
                options,
                room,
                headroom,
                speeds,
            )
            if axes.pp > 1:
                layers = (own.layers.start, own.layers.stop)
                estimated = replace(estimated, layers=layers)
            found.append(estimated)
    run = _run(found, number, schedule)
    return MeshEstimate(
        model=type(model).__name__,
        mesh=axes,
        device=target.device.title,
        data_parallel=data_parallel,
        num_microbatches=number,
        schedule=schedule,
        budget_bytes=None if room is None else room.total_bytes,
        headroom_bytes=0 if room is None else room.headroom_bytes,
        links=source,
        stages=tuple(found),
        step_us=None if run is None else run.step_ns / 1e3 + max(map(_afterwards_us, found)),
        bubble=None if run is None else min(run.idle_share(s) for s in range(axes.pp)),
    )


def _check(
    axes: Mesh,
    sample_input: Any,
    data_parallel: str,
    granularity: str,
    schedule: str,
    num_microbatches: int | None,
) -> None:
    if not isinstance(sample_input, Mapping):
        raise TypeError("sample_input is a dict of keyword arguments: one micro-batch, by name")
    if data_parallel not in get_args(DataParallelKind):
        kinds = get_args(DataParallelKind)
        raise ValueError(f"data_parallel is one of {kinds}, got {data_parallel!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is one of {SCHEDULES}, got {schedule!r}")
    if granularity not in ("step", "blocks"):
        raise ValueError(f"granularity is 'step' or 'blocks', got {granularity!r}")
    if axes.pp > 1 and granularity == "blocks":
        raise ValueError(
            "granularity='blocks' counts one call at a time, and a stage has several micro-batches "
            "in flight: leave it out, or estimate pp=1"
        )
    if data_parallel == "fsdp2" and (axes.dp == 1 or axes.pp > 1 or granularity != "blocks"):
        raise ValueError(
            "data_parallel='fsdp2' is estimated among two or more dp ranks, for pp=1, by "
            "granularity='blocks'"
        )
    if num_microbatches is not None:
        positive_integers("num_microbatches", (num_microbatches,))
    elif axes.pp > 1:
        raise ValueError(f"num_microbatches= is needed: {axes.pp} stages work on several at once")


def _in_stage(
    styles: Mapping[str, str], prefix: str, module: nn.Module
) -> Iterator[tuple[str, str]]:
    """The styles of what a stage has; its layers are numbered from 0."""
    have = {path for path, part in module.named_modules() if not isinstance(part, nn.Identity)}
    for path, style in styles.items():
        if path.startswith(prefix) and path.removeprefix(prefix) in have:
            yield path, style


def _run(
    stages: Sequence[StageEstimate[Plan]], number: int, schedule: PipelineSchedule
) -> PipelineRun | None:
    """Simulate a step; ``None`` where a stage does not fit, or a bandwidth is not known."""
    times, send_us = [], 0.0
    for stage in stages:
        if stage.memory is None or any(each.time_us is None for each in stage.traffic):
            return None
        forward, backward = stage.forward_us, stage.backward_us
        for each in stage.traffic:
            assert each.time_us is not None
            if each.axis == "tp" and each.is_forward:
                forward += each.time_us / number
            elif each.axis == "tp":
                backward += each.time_us / number
            elif each.axis == "pp":
                send_us = max(send_us, each.time_us / number)
        times.append(StageTimes(forward_ns=round(1e3 * forward), backward_ns=round(1e3 * backward)))
    return simulate(times, number, schedule, send_ns=round(1e3 * send_us))


def _afterwards_us(stage: StageEstimate[Plan]) -> float:
    """Time of a stage between the last micro-batch and the next step."""
    exposed = (each.exposed_us or 0.0 for each in stage.traffic if each.axis == "dp")
    return sum(exposed) + stage.optimizer_us
