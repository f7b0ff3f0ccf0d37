"""The commands about many devices: ``remat estimate-mesh`` and ``remat pipeline``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CaptureError
from ..mesh.estimate_mesh import estimate_mesh
from ..optimize import optimize
from ..pipeline import PipelinePlan, Stage, plan_pipeline
from ..plan import Plan
from .answers import Answer, AsJson, ExitCode, command, fail, say_error
from .arguments import (
    Autocast,
    Blocks,
    CostModelName,
    DeviceName,
    Headroom,
    OptimizerName,
    OutputsWord,
    Target,
    check_folder,
    load_object,
    load_target,
    model_and_sample,
    read_autocast,
    read_blocks,
    read_headroom,
    read_holds,
    save_plan,
)

Microbatches = Annotated[int | None, typer.Option(help="of a step, for each data-parallel rank")]
ScheduleName = Annotated[str, typer.Option(help="1f1b or gpipe")]
Gap = Annotated[float, typer.Option(help="stop when proven to be this near the least time")]

_BUILDS_STAGE = (
    "give module:function, where the function takes a stage (stage.index, .first, .end, "
    ".calls_in_flight) and returns its (model, sample_input) or (model, sample_input, loss_fn)"
)


@command
def estimate_mesh_command(
    target: Target,
    mesh: Annotated[str, typer.Option(help="ranks of each axis, e.g. dp=64,tp=8,pp=4")],
    num_microbatches: Microbatches = None,
    schedule: ScheduleName = "1f1b",
    data_parallel: Annotated[
        str, typer.Option(help="ddp, or fsdp2 (one stage, with --blocks): what dp ranks train in")
    ] = "ddp",
    bandwidth: Annotated[
        str | None,
        typer.Option(help="GB/s that a rank sends, e.g. tp=300,dp=20,pp=20; else of data sheets"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="of each rank, e.g. 70GiB; else the device's memory")
    ] = None,
    blocks: Blocks = None,
    optimizer: OptimizerName = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    cost_model: CostModelName = "roofline",
    headroom: Headroom = None,
    outputs: OutputsWord = "held",
    time_limit_s: Annotated[float, typer.Option(help="for each stage's plan")] = 15.0,
    gap: Gap = 0.001,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> Answer:
    """What each rank of a mesh of devices holds, computes and sends; nothing runs."""
    dtype = read_autocast(autocast)
    ranks = {axis: _whole("--mesh", n) for axis, n in _pairs("--mesh", mesh).items()}
    speeds = None
    if bandwidth is not None:
        pairs = _pairs("--bandwidth", bandwidth)
        speeds = {axis: _number("--bandwidth", n) for axis, n in pairs.items()}
    model, sample_input, loss_fn = load_target(target)
    try:
        found = estimate_mesh(
            model,
            sample_input,
            mesh=ranks,
            num_microbatches=num_microbatches,
            schedule=schedule,  # type: ignore[arg-type]
            data_parallel=data_parallel,  # type: ignore[arg-type]
            bandwidth_gb_per_s=speeds,
            budget=budget,
            **read_blocks(blocks),
            loss_fn=loss_fn,
            optimizer=optimizer,
            device=device,
            autocast=dtype,
            cost_model=cost_model,
            headroom=read_headroom(headroom),
            outputs=read_holds(outputs, "none", "0", None)["outputs"],
            time_limit_s=time_limit_s,
            gap=gap,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    except (CaptureError, TypeError, ValueError) as error:  # TypeError: a sample without names
        fail(_by_options("\n".join([str(error), *getattr(error, "__notes__", ())])))
    return Answer(
        text=_by_options(str(found)),
        data=found.to_dict(),
        failure="" if found.fits else "not every stage is known to fit",
        code=ExitCode.DONE if found.fits else ExitCode.NOTHING_FITS,
    )


@command
def pipeline_command(
    target: Annotated[
        str,
        typer.Argument(
            help="module:function of a stage (.index, .first, .end, .calls_in_flight) that returns "
            "its (model, sample_input) or those and loss_fn; the sample is one micro-batch"
        ),
    ],
    budget: Annotated[str, typer.Option(help="of each device, e.g. 40GB or 40GiB")],
    num_layers: Annotated[int, typer.Option(help="to be divided among the stages")],
    num_stages: Annotated[int, typer.Option()],
    num_microbatches: Annotated[int, typer.Option(help="of a step")],
    schedule: ScheduleName = "1f1b",
    alike: Annotated[
        bool, typer.Option("--alike", help="all layers are alike: plan stages of one kind once")
    ] = False,
    send_us: Annotated[float, typer.Option(help="microseconds of a message between stages")] = 0.0,
    optimizer: OptimizerName = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    cost_model: CostModelName = "roofline",
    headroom: Headroom = None,
    time_limit_s: Annotated[float, typer.Option(help="for each plan")] = 15.0,
    gap: Gap = 0.001,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None, typer.Option(help="write each stage's plan to a file in this folder")
    ] = None,
    as_json: AsJson = False,
) -> Answer:
    """Divide a model's layers among the stages of a pipeline, each with its own plan."""
    dtype = read_autocast(autocast)
    if "%" in budget:
        fail(f"--budget={budget!r} is a share of no one peak: write bytes such as 40GB")
    check_folder("--out", out)
    build = load_object(target, _BUILDS_STAGE)
    if not callable(build):
        fail(f"{target} is a {type(build).__name__}, which cannot be called; {_BUILDS_STAGE}")

    def plan_stage(stage: Stage) -> Plan:
        model, sample_input, loss_fn = model_and_sample(target, build, _BUILDS_STAGE, stage)
        return optimize(
            model,
            sample_input,
            budget=budget,
            loss_fn=loss_fn,
            optimizer=optimizer,
            device=device,
            autocast=dtype,
            cost_model=cost_model,
            headroom=read_headroom(headroom),
            grads="accumulated",
            concurrent_calls=stage.calls_in_flight,
            time_limit_s=time_limit_s,
            gap=gap,
            seed=seed,
        )

    try:
        found = plan_pipeline(
            plan_stage,
            num_layers=num_layers,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            schedule=schedule,  # type: ignore[arg-type]
            send_us=send_us,
            alike=alike,
        )
    except (CaptureError, ValueError) as error:
        say_error(error)
    said = []
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out: {error}")
        for planned in found.stages:
            said.append(save_plan(planned.plan, out / f"stage_{planned.stage.index}.json"))
    return Answer(text=str(found), data=_figures(found), said=said)


_OPTION_OF = {
    "num_microbatches=": "--num-microbatches",
    "bandwidth_gb_per_s=": "--bandwidth",
    "granularity='blocks'": "--blocks",
    "data_parallel=": "--data-parallel=",
    "tp_plan=": "tp_plan= (in Python)",
}


def _by_options(text: str) -> str:
    """Name options instead of the arguments that they stand for."""
    for argument, option in _OPTION_OF.items():
        text = text.replace(argument, option)
    return text


def _pairs(option: str, text: str) -> dict[str, str]:
    """Read ``"dp=64,tp=8"``."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            fail(f"{option} takes axes and numbers, such as dp=64,tp=8,pp=4, got {text!r}")
        if name in pairs:
            fail(f"{option} names the axis {name!r} twice: {text!r}")
        pairs[name] = value
    return pairs


def _whole(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        fail(f"{option} takes a whole number of ranks for each axis, got {text!r}")
    return int(text)


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        fail(f"{option} takes GB/s for each axis, such as tp=300, got {text!r}")


def _figures(found: PipelinePlan) -> dict[str, Any]:
    """Plain figures of a pipeline."""
    return {
        "schedule": found.schedule,
        "num_microbatches": found.num_microbatches,
        "step_us": found.step_us,
        "lower_bound_us": found.lower_bound_us,
        "even_us": found.even_us,
        "uniform_us": found.uniform_us,
        "stages": [
            {
                "stage": planned.stage.index,
                "first_layer": planned.stage.first,
                "end_layer": planned.stage.end,
                "calls_in_flight": planned.stage.calls_in_flight,
                "budget_bytes": planned.plan.budget_bytes,
                "peak_bytes": planned.plan.predicted_peak_bytes,
                "overhead": planned.plan.overhead,
                "gap": planned.plan.gap,
                "forward_us": planned.forward_us,
                "backward_us": planned.backward_us,
                "idle_share": idle,
            }
            for planned, idle in zip(found.stages, found.idle_shares, strict=True)
        ],
    }
