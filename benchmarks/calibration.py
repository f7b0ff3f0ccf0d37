"""Fit a device's efficiencies to measured times of calls, and compute a roofline's errors.

The fit is robust: each class of operators gets the weighted median of the share of the
roofline that its calls reached. Each call is weighted by its share of its model's step,
so that neither outliers nor many tiny calls nor one large model dominate. Operators
that are far from their class get a time per element instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log

import torch

from graph_capture.costs.device import Device
from graph_capture.costs.operator_classes import (
    ATTENTION,
    CONVOLUTION,
    DEPTHWISE,
    MATMUL,
    RANDOM,
    REDUCTION,
)
from graph_capture.costs.roofline import Work, roofline_ns, time_of_work_ns

# A call below the first two counts as a launch only; one above the others tells rates.
_FEW_BYTES = 1 << 10
_MANY_BYTES = 1 << 14
_MANY_FLOPS = 10**6

# An operator gets a time per element if its calls are off their class by this factor, and if there
# are this many distinct ones.
_OFF = 1.4
_FEW = 3

# The size of their output says nothing about the time of these.
_NOT_BY_ELEMENT = (MATMUL, CONVOLUTION, DEPTHWISE, ATTENTION, REDUCTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One distinct call of a model's step, measured.

    Parameters
    ----------
    model
        The model whose step it belongs to.
    work
        Its work.
    measured_ns
        Its measured time.
    count
        How often the step makes it.
    """

    model: str
    work: Work
    measured_ns: int
    count: int = 1

    @property
    def weight_ns(self) -> int:
        """Its share of the step."""
        return self.measured_ns * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """How far predictions are from measurements over some calls.

    Parameters
    ----------
    num_calls
        Number of distinct calls.
    share_of_time
        Share of all calls' measured time.
    median_factor, p90_factor
        Median and 90th percentile over distinct calls of the factor by which they
        are off, in either direction; 1 is exact.
    weighted_error
        Sum of absolute differences over the sum of measured times.
    step_ratio
        Sum of predictions over sum of measurements.
    """

    num_calls: int
    share_of_time: float
    median_factor: float
    p90_factor: float
    weighted_error: float
    step_ratio: float


Predict = Callable[[Sample], int]


def by_device(device: Device) -> Predict:
    """Predictions of a device's roofline, ns."""
    return lambda sample: time_of_work_ns(sample.work, device)


def held_out(samples: Sequence[Sample], device: Device) -> Predict:
    """Predictions for each model by a fit to the other half of the models.

    The halves are every other model, in the given order.
    """
    models = list(dict.fromkeys(s.model for s in samples))
    if len(models) < 2:
        raise ValueError("to hold out half of the models takes two of them")
    halves = (set(models[::2]), set(models[1::2]))
    fits = [fit([s for s in samples if s.model not in half], device) for half in halves]
    return lambda sample: time_of_work_ns(sample.work, fits[sample.model not in halves[0]])


def errors_of(samples: Sequence[Sample], predict: Predict, total_ns: int | None = None) -> Errors:
    """Compare predictions with measurements.

    Parameters
    ----------
    predict
        From a call to nanoseconds.
    total_ns
        The total for ``share_of_time``; ``None`` for the time of these samples.

    Raises
    ------
    ValueError
        When there are no samples.
    """
    if not samples:
        raise ValueError("no calls to compare")
    measured_ns = sum(s.weight_ns for s in samples)
    predicted = [(s, predict(s)) for s in samples]
    off = sorted(abs(log(max(1, p) / s.measured_ns)) for s, p in predicted)
    return Errors(
        num_calls=len(samples),
        share_of_time=measured_ns / (total_ns or measured_ns),
        median_factor=exp(off[(len(off) - 1) // 2]),
        p90_factor=exp(off[min(len(off) - 1, (9 * len(off)) // 10)]),
        weighted_error=sum(abs(p - s.measured_ns) * s.count for s, p in predicted) / measured_ns,
        step_ratio=sum(p * s.count for s, p in predicted) / measured_ns,
    )


def errors_by_class(samples: Sequence[Sample], predict: Predict) -> dict[str, Errors]:
    """Errors of each operator class that occurs, largest share of time first."""
    return _errors_of_groups(samples, predict, lambda s: s.work.operator_class)


def errors_by_model(samples: Sequence[Sample], predict: Predict) -> dict[str, Errors]:
    """Errors of each model's step."""
    return _errors_of_groups(samples, predict, lambda s: s.model)


def _errors_of_groups(
    samples: Sequence[Sample], predict: Predict, key: Callable[[Sample], str]
) -> dict[str, Errors]:
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        groups.setdefault(key(s), []).append(s)
    total_ns = sum(s.weight_ns for s in samples)
    errors = {name: errors_of(group, predict, total_ns) for name, group in groups.items()}
    return dict(sorted(errors.items(), key=lambda item: -item[1].share_of_time))


def fit(samples: Sequence[Sample], device: Device) -> Device:
    """The device with launch time, efficiencies and times per element fitted to samples.

    Classes and operators without samples keep their figures. Peaks stay unchanged,
    because efficiencies are relative to them, except for a CPU's rates in dtypes other
    than float32, which no data sheet gives.
    """
    launch_ns = _fit_launch(samples, device)
    weighted = _weighted(samples, device)
    base = replace(device, launch_ns=launch_ns, element_ns={})
    if device.torch_type == "cpu":
        base = replace(base, flops_per_s=_fit_rates(weighted, base))
    works: dict[str, set[Work]] = {}
    for s, _ in weighted:
        works.setdefault(_name(s), set()).add(s.work)
    kept = {
        name: ns
        for name, ns in device.element_ns.items()
        if len(works.get(name.removesuffix("_"), ())) < _FEW
    }
    odd: dict[str, float] = {}
    efficiency = dict(device.efficiency)
    while True:
        rest = [(s, weight) for s, weight in weighted if _name(s) not in odd]
        efficiency |= _fit_efficiency(rest, base)  # a class of odd ones keeps what it had
        fitted = replace(base, efficiency=dict(efficiency))
        more = _odd_operators(rest, fitted)
        if not more:
            return replace(fitted, element_ns=dict(sorted({**kept, **odd}.items())))
        odd |= more


def _weighted(samples: Sequence[Sample], device: Device) -> list[tuple[Sample, float]]:
    """Calls that are more than a launch, with their shares of their model's step.

    The share is of the roofline's time: by measured time, slow calls would weigh more
    than equally large fast ones.
    """
    large = [s for s in samples if s.work.num_bytes >= _MANY_BYTES or s.work.flops >= _MANY_FLOPS]
    weights = [s.count * roofline_ns(s.work, device) for s in large]
    of_model: dict[str, float] = {}
    for s, weight in zip(large, weights, strict=True):
        of_model[s.model] = of_model.get(s.model, 0.0) + weight
    return [(s, w / of_model[s.model]) for s, w in zip(large, weights, strict=True) if w > 0]


def _fit_launch(samples: Sequence[Sample], device: Device) -> int:
    tiny = [
        (float(s.measured_ns), float(s.count))
        for s in samples
        if s.work.num_bytes < _FEW_BYTES and s.work.flops < _MANY_FLOPS
    ]
    return round(_weighted_median(tiny)) if len(tiny) >= _FEW else device.launch_ns


def _fit_rates(
    weighted: Sequence[tuple[Sample, float]], device: Device
) -> Mapping[torch.dtype, float]:
    """Rates of products by dtype such that float32's efficiency holds for all of them.

    Fitted to all products of a dtype together: without hardware for it, the time of a
    bfloat16 product varies by a factor of thirty with the layout of its factors, and a
    median would miss most of it.
    """
    flops: dict[torch.dtype, int] = {}
    taken_ns: dict[torch.dtype, int] = {}
    for s, _ in weighted:
        if s.work.operator_class == MATMUL and s.work.flops:
            flops[s.work.dtype] = flops.get(s.work.dtype, 0) + s.work.flops * s.count
            taken_ns[s.work.dtype] = taken_ns.get(s.work.dtype, 0) + s.weight_ns
    reached = {dtype: flops[dtype] / taken_ns[dtype] for dtype in flops}
    rates = dict(device.flops_per_s)
    if torch.float32 in reached:
        peak = rates[torch.float32] / reached[torch.float32]
        rates |= {dtype: rate * peak for dtype, rate in reached.items()}
    return rates


def _fit_efficiency(weighted: Sequence[tuple[Sample, float]], device: Device) -> dict[str, float]:
    reached: dict[str, list[tuple[float, float]]] = {}
    for s, weight in weighted:
        share = roofline_ns(s.work, device) / s.measured_ns
        if share > 0:
            reached.setdefault(s.work.operator_class, []).append((share, weight))
    return {name: _weighted_median(shares) for name, shares in reached.items()}


def _odd_operators(weighted: Sequence[tuple[Sample, float]], device: Device) -> dict[str, float]:
    """Nanoseconds per element of operators that move memory differently from their class.

    Draws on a CPU always take time per element, whether they make bytes or floats.
    """
    groups: dict[str, list[tuple[Sample, float]]] = {}
    for s, weight in weighted:
        if s.work.operator_class not in _NOT_BY_ELEMENT and s.work.num_elements:
            groups.setdefault(_name(s), []).append((s, weight))
    found: dict[str, float] = {}
    for name, group in groups.items():
        off = [(log(s.measured_ns / time_of_work_ns(s.work, device)), w) for s, w in group]
        drawn = device.torch_type == "cpu" and group[0][0].work.operator_class == RANDOM
        few = len({s.work for s, _ in group}) < _FEW
        if drawn or (not few and abs(_weighted_median(off)) > log(_OFF)):
            found[name] = _weighted_median(
                [(s.measured_ns / s.work.num_elements, w) for s, w in group]
            )
    return found


def _name(sample: Sample) -> str:
    return sample.work.name.removesuffix("_")


def _weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """The least value up to which half of the weight lies."""
    ordered = sorted(values)
    half, passed = sum(weight for _, weight in ordered) / 2, 0.0
    for value, weight in ordered:
        passed += weight
        if passed >= half:
            return value
    raise ValueError("no values to take a median of")


def entry_text(device: Device) -> str:
    """The fitted figures in the format of ``graph_capture/costs/devices.py``."""

    def table(values: Mapping[str, float]) -> str:
        ordered = sorted(values.items(), key=lambda item: item[0])
        return "".join(f'\n    "{name}": {value:.3g},' for name, value in ordered)

    rates = "".join(f"\n    {dtype}: {rate:.3g}," for dtype, rate in device.flops_per_s.items())
    return (
        f"flops_per_s={{{rates}\n}},\n"
        f"launch_ns={device.launch_ns:_},\n"
        f"efficiency={{{table(device.efficiency)}\n}},\n"
        f"element_ns={{{table(device.element_ns)}\n}},"
    )
