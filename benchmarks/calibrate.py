"""Measure how good the roofline is on the device at hand, and fit better figures.

``make calibrate``, or ``python -m benchmarks.calibrate --help``. Times each
distinct call of a suite of training steps (the cost model ``"profile"``), fits
the device's efficiencies to the times, and prints an entry for
``graph_capture/costs/devices.py``, with the remaining errors, also on models
that the fit has not seen.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from graph_capture.calls.call_spec import bind_call, split_sample, tensors_of
from graph_capture.costs.cost_model import Call, CostRecord
from graph_capture.costs.devices import Device, device_for
from graph_capture.costs.profile import Profile, ProfiledCosts
from graph_capture.costs.roofline import Roofline, work_of
from graph_capture.costs.target import Target, target_of
from graph_capture.costs.trial import call_key
from graph_capture.step_capture import capture_step

from .calibration import (
    Errors,
    Predict,
    Sample,
    by_device,
    entry_text,
    errors_by_class,
    errors_by_model,
    errors_of,
    fit,
    held_out,
)
from .calibration_suite import SUITE
from .testing.zoo import Case

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Listener:
    """A cost model that records the calls of a step.

    Parameters
    ----------
    target
        The target whose roofline gives the times meanwhile.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._roofline = Roofline(target.device)
        self.calls: dict[str, tuple[Call, int]] = {}

    def time_ns(self, call: Call) -> int:
        key = call_key(call, self._target.torch_type)
        self.calls[key] = (call, self.calls.get(key, (call, 0))[1] + 1)
        return self._roofline.time_ns(call)

    def record(self) -> CostRecord:
        return self._roofline.record()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measurements of one model.

    Parameters
    ----------
    samples
        Its distinct calls that could be timed.
    num_untimed
        Number of distinct calls that could not be timed.
    step_ns
        Forward, loss and backward in eager PyTorch; ``None`` if the model has no loss.
    calls_ns
        Sum of the timed calls of one step.
    """

    samples: tuple[Sample, ...]
    num_untimed: int
    step_ns: int | None
    calls_ns: int


def measure(case: Case, device_type: str, repeats: int) -> Measured:
    """Time a model's calls one by one, and its whole step."""
    model = case.make().to(device_type)
    inputs = _moved(case.sample(0), device_type)
    # the suite's own losses hold labels on the CPU
    loss = case.loss_fn if device_type == "cpu" or case.loss_fn is None else _any_loss
    arguments = bind_call(model.forward, *split_sample(inputs))
    target = target_of(model, tensors_of(arguments))
    listener = Listener(target)
    with _autocast(case, device_type):
        capture_step(
            model,
            arguments,
            loss=loss,
            forward=model.forward,
            measure_scratch=False,
            target=target,
            cost_model=listener,
        )
        times = _times_ns([call for call, _ in listener.calls.values()], target, repeats)
        step_ns = _step_ns(model, inputs, loss, repeats)
    samples = tuple(
        Sample(
            model=case.name,
            work=work_of(call.func, call.args, call.kwargs, call.out),
            measured_ns=times[key],
            count=count,
        )
        for key, (call, count) in listener.calls.items()
        if key in times
    )
    return Measured(
        samples=samples,
        num_untimed=len(listener.calls) - len(samples),
        step_ns=step_ns,
        # a capture prices each call twice: for the eager step and for the planned one
        calls_ns=sum(s.weight_ns for s in samples) // 2,
    )


def _times_ns(calls: Iterable[Call], target: Target, repeats: int) -> dict[str, int]:
    """The least of several profiles' medians: other load on the machine only adds time."""
    calls = list(calls)
    rounds: dict[str, list[int]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as nothing_known:
            costs = ProfiledCosts(target, Profile(cache_dir=nothing_known))
            costs.prepare(calls)
            for call in calls:
                key = call_key(call, target.torch_type)
                time_ns = costs.cache.get("time_ns", key)
                if time_ns is not None:
                    rounds.setdefault(key, []).append(max(1, time_ns))
    return {key: min(taken) for key, taken in rounds.items()}


def _step_ns(model: nn.Module, inputs: Any, loss_fn: Any, repeats: int) -> int | None:
    args, kwargs = split_sample(inputs)
    taken: list[int] = []
    for _ in range(1 + 2 * repeats):
        model.zero_grad(set_to_none=True)
        _wait()
        start_ns = time.perf_counter_ns()
        output = model(*args, **kwargs)
        loss = loss_fn(output) if loss_fn is not None else getattr(output, "loss", output)
        if not isinstance(loss, torch.Tensor):
            return None
        loss.backward()
        _wait()
        taken.append(time.perf_counter_ns() - start_ns)
    return min(taken[1:])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _any_loss(output: Any) -> torch.Tensor:
    return output.float().square().mean()


def _moved(tree: Any, device_type: str) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.to(device_type) if isinstance(x, torch.Tensor) else x, tree
    )


def _autocast(case: Case, device_type: str) -> Any:
    return case.context() if case.autocast is None else torch.autocast(device_type, case.autocast)


@app.command()
def main(
    model: Annotated[
        list[str] | None,
        typer.Argument(help=f"of {', '.join(SUITE)}; all by default", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(help="profiles to take the least of", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="of a CPU", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("build/calibrate"),
) -> None:
    """Fit the roofline to measured times on the device at hand.

    The printed entry goes into graph_capture/costs/devices.py, in place of that
    device's figures. Without changing the package, put it into your own device, which
    every function that takes a device accepts:

        mine = dataclasses.replace(device_for("cuda"), efficiency={...}, launch_ns=...)

        optimize(model, sample, budget_gb=40, device=mine)
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    unknown = sorted(set(model or ()) - SUITE.keys())
    if unknown:
        raise typer.BadParameter(f"unknown model {', '.join(unknown)}")
    torch.set_num_threads(threads)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    entry = device_for(device_type)
    results: dict[str, Measured] = {}
    for name in model or SUITE:
        with console.status(name):
            results[name] = measure(SUITE[name](), device_type, repeats)
        console.print(f"{name}: {len(results[name].samples)} distinct calls")
    samples = [s for result in results.values() for s in result.samples]
    fitted = fit(samples, entry)
    predictions: dict[str, Predict] = {
        "peaks alone": by_device(replace(entry, efficiency={}, element_ns={})),
        "entry": by_device(entry),
        "fit": by_device(fitted),
    }
    if len(results) > 1:
        predictions["held out"] = held_out(samples, entry)
    about = _about(entry, device_type, threads, repeats)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    console.print(_calls_table(samples, predictions))
    console.print(_steps_table(results, samples, predictions))
    console.print("\n" + entry_text(fitted), highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{entry.name}.json"
    path.write_text(json.dumps(_record(about, fitted, results, samples, predictions), indent=1))
    console.print(f"\nwritten to {path}")


def _about(entry: Device, device_type: str, threads: int, repeats: int) -> dict[str, str]:
    at_hand = torch.cuda.get_device_name() if device_type == "cuda" else _processor()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": at_hand,
        "entry": entry.name,
        "threads": str(threads),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": str(repeats),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _calls_table(samples: list[Sample], predictions: dict[str, Predict]) -> Table:
    table = Table(
        title="calls by class: median and 90th percentile of the factor off, time-weighted error"
    )
    table.add_column("class")
    for name in ("calls", "time %", *predictions):
        table.add_column(name, justify="right")
    by_class = {name: errors_by_class(samples, predict) for name, predict in predictions.items()}
    overall = {name: errors_of(samples, predict) for name, predict in predictions.items()}
    rows = {name: {p: by_class[p][name] for p in predictions} for name in by_class["entry"]}
    for name, errors in {**rows, "all": overall}.items():
        first = errors["entry"]
        figures = [
            f"{e.median_factor:.2f} {e.p90_factor:.2f} {100 * e.weighted_error:.0f} %"
            for e in errors.values()
        ]
        share = f"{100 * first.share_of_time:.1f}"
        table.add_row(name, str(first.num_calls), share, *figures)
    return table


def _steps_table(
    results: dict[str, Measured], samples: list[Sample], predictions: dict[str, Predict]
) -> Table:
    table = Table(title="whole steps: predicted time of all calls over their measured time")
    table.add_column("model")
    for name in ("step, ms", "calls, ms", *predictions):
        table.add_column(name, justify="right")
    by_model = {name: errors_by_model(samples, predict) for name, predict in predictions.items()}
    for name, result in results.items():
        own = result.samples[0].model
        table.add_row(
            name,
            "-" if result.step_ns is None else f"{result.step_ns / 1e6:.1f}",
            f"{result.calls_ns / 1e6:.1f}",
            *(f"{by_model[p][own].step_ratio:.2f}" for p in predictions),
        )
    return table


def _record(
    about: dict[str, str],
    fitted: Device,
    results: dict[str, Measured],
    samples: list[Sample],
    predictions: dict[str, Predict],
) -> dict[str, Any]:
    def as_dict(errors: dict[str, Errors]) -> dict[str, Any]:
        return {name: asdict(e) for name, e in errors.items()}

    return {
        **about,
        "fitted": {
            "flops_per_s": {str(k): v for k, v in fitted.flops_per_s.items()},
            "launch_ns": fitted.launch_ns,
            "efficiency": dict(fitted.efficiency),
            "element_ns": dict(fitted.element_ns),
        },
        "steps": {
            name: {
                "step_ns": result.step_ns,
                "calls_ns": result.calls_ns,
                "num_calls": len(result.samples),
                "num_untimed": result.num_untimed,
            }
            for name, result in results.items()
        },
        "calls": [
            {**asdict(s.work), "dtype": str(s.work.dtype), "model": s.model}
            | {"measured_ns": s.measured_ns, "count": s.count}
            for s in samples
        ],
        "errors": {
            name: {
                "all": asdict(errors_of(samples, predict)),
                "by_class": as_dict(errors_by_class(samples, predict)),
                "by_model": as_dict(errors_by_model(samples, predict)),
            }
            for name, predict in predictions.items()
        },
    }


if __name__ == "__main__":
    app()
