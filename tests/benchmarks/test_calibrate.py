"""The fit of a roofline to measured times, and the tool around it."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.calibrate import app
from benchmarks.calibration import (
    Sample,
    by_device,
    entry_text,
    errors_by_class,
    errors_by_model,
    errors_of,
    fit,
    held_out,
)
from benchmarks.calibration_suite import SUITE
from graph_capture.costs.devices import DEVICES, Device
from graph_capture.costs.roofline import Work, time_of_work_ns

TRUTH = Device(
    name="truth",
    title="a device that reaches known shares of its peaks",
    torch_type="cuda",
    flops_per_s={torch.float32: 1e12, torch.bfloat16: 8e12},
    bytes_per_s=1e11,
    launch_ns=7_000,
    efficiency={"matmul": 0.5, "elementwise": 0.8, "copy": 0.9},
    element_ns={"aten::tanh": 3.0},
)
PEAKS = replace(TRUTH, efficiency={}, element_ns={}, launch_ns=1)


def _work(
    name: str, class_name: str, elements: int, flops: int = 0, dtype: torch.dtype = torch.float32
) -> Work:
    return Work(
        name=f"aten::{name}",
        operator_class=class_name,
        flops=flops,
        dtype=dtype,
        num_bytes=8 * elements,
        num_elements=elements,
    )


def _samples(device: Device, model: str = "a") -> list[Sample]:
    """Calls of several sizes, with the times that a device takes by its roofline."""
    works = [_work("add", "elementwise", 1)] * 5
    for size in (10**6, 3 * 10**6, 10**7):
        works += [
            _work("mm", "matmul", size, flops=1000 * size),
            _work("mm", "matmul", size, flops=8000 * size, dtype=torch.bfloat16),
            _work("add", "elementwise", size),
            _work("mul", "elementwise", size),
            _work("clone", "copy", size),
            _work("tanh", "elementwise", size),
        ]
    return [Sample(model=model, work=w, measured_ns=time_of_work_ns(w, device)) for w in works]


def test_a_fit_finds_what_the_times_were_made_from() -> None:
    """Launch, efficiencies and the one operator with a time by element come back from peaks."""
    fitted = fit(_samples(TRUTH), PEAKS)
    assert fitted.launch_ns == TRUTH.launch_ns
    assert fitted.efficiency == pytest.approx(dict(TRUTH.efficiency), rel=1e-3)
    assert fitted.element_ns == pytest.approx(dict(TRUTH.element_ns), rel=1e-3)
    errors = errors_of(_samples(TRUTH), by_device(fitted))
    assert errors.weighted_error < 1e-3
    assert errors.p90_factor == pytest.approx(1, rel=1e-3)


def test_one_odd_call_decides_nothing() -> None:
    """A call that took fifty times too long leaves the fit as it is."""
    samples = _samples(TRUTH)
    slow = replace(samples[7], measured_ns=50 * samples[7].measured_ns)
    fitted = fit([*samples[:7], slow, *samples[8:]], PEAKS)
    assert fitted.efficiency == pytest.approx(dict(TRUTH.efficiency), rel=1e-3)


def test_a_gpus_peaks_are_its_data_sheets() -> None:
    """A fit changes a CPU's rates of other dtypes, never a card's."""
    twice = replace(TRUTH, flops_per_s={torch.float32: 1e12, torch.bfloat16: 4e12})
    assert fit(_samples(twice), PEAKS).flops_per_s == PEAKS.flops_per_s
    rates = fit(_samples(twice), replace(PEAKS, torch_type="cpu")).flops_per_s
    assert rates[torch.bfloat16] == pytest.approx(4e12, rel=1e-3)
    assert rates[torch.float32] == 1e12


def test_what_was_not_seen_keeps_its_figures() -> None:
    """Classes and operators without samples stay as they were in the entry."""
    before = replace(PEAKS, efficiency={"attention": 0.3}, element_ns={"aten::erf": 1.5})
    fitted = fit(_samples(TRUTH), before)
    assert fitted.efficiency["attention"] == 0.3
    assert fitted.element_ns["aten::erf"] == 1.5


def test_errors_by_hand() -> None:
    """Predictions of 2, 1 and 1/2 of what was measured: factors 2, 1 and 2, half of them over."""
    work = _work("add", "elementwise", 1)
    samples = [
        Sample(model="m", work=replace(work, num_elements=n), measured_ns=100, count=c)
        for n, c in ((200, 1), (100, 2), (50, 1))
    ]
    errors = errors_of(samples, lambda s: s.work.num_elements)
    assert errors.num_calls == 3
    assert errors.median_factor == pytest.approx(2)
    assert errors.weighted_error == pytest.approx((100 + 0 + 50) / 400)
    assert errors.step_ratio == pytest.approx((200 + 2 * 100 + 50) / 400)
    assert errors_of(samples[1:2], lambda s: 100).p90_factor == pytest.approx(1)


def test_errors_are_grouped_by_class_and_by_model() -> None:
    """Shares of time add up to all of it, and each group has its own calls."""
    samples = [*_samples(TRUTH, "a"), *_samples(TRUTH, "b")]
    for groups in (
        errors_by_class(samples, by_device(TRUTH)),
        errors_by_model(samples, by_device(TRUTH)),
    ):
        assert sum(e.share_of_time for e in groups.values()) == pytest.approx(1)
        assert sum(e.num_calls for e in groups.values()) == len(samples)
    assert set(errors_by_model(samples, by_device(TRUTH))) == {"a", "b"}


def test_held_out_models_are_predicted_by_the_other_half() -> None:
    """Of two models that run at different shares, each is predicted with the other's."""
    slower = replace(TRUTH, efficiency={name: v / 2 for name, v in TRUTH.efficiency.items()})
    samples = [*_samples(TRUTH, "fast"), *_samples(slower, "slow")]
    ratios = {
        name: errors.step_ratio
        for name, errors in errors_by_model(samples, held_out(samples, PEAKS)).items()
    }
    assert ratios["fast"] > sqrt(2)
    assert ratios["slow"] < 1 / sqrt(2)
    with pytest.raises(ValueError, match="takes two"):
        held_out(_samples(TRUTH), PEAKS)


def test_no_calls_are_no_comparison() -> None:
    """Errors of nothing are refused."""
    with pytest.raises(ValueError, match="no calls"):
        errors_of([], by_device(TRUTH))


def test_the_printed_entry_is_what_a_device_takes() -> None:
    """The text, read as keyword arguments, gives the fitted device back, to three digits."""
    fitted = fit(_samples(TRUTH), PEAKS)
    arguments = eval(f"dict({entry_text(fitted)})", {"torch": torch})
    copy = replace(PEAKS, **arguments)
    assert copy.efficiency == pytest.approx(dict(fitted.efficiency), rel=0.01)
    assert copy.element_ns == pytest.approx(dict(fitted.element_ns), rel=0.01)
    assert copy.launch_ns == fitted.launch_ns


def test_an_unknown_model_is_refused() -> None:
    """The tool names the model that it does not know."""
    result = CliRunner().invoke(app, ["resnet_9000"])
    assert result.exit_code == 2
    assert "resnet_9000" in result.output


@pytest.mark.slow
def test_the_tool_measures_fits_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two models: tables, an entry, and a JSON with errors of all four predictions."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        result = CliRunner().invoke(
            app, ["mlp_frozen", "many_outputs", "--repeats", "1", "--out", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "efficiency={" in result.output
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert set(record["errors"]) == {"peaks alone", "entry", "fit", "held out"}
    assert set(record["steps"]) == {"mlp_frozen", "many_outputs"}
    assert record["steps"]["mlp_frozen"]["num_untimed"] == 0
    assert 0 < record["fitted"]["efficiency"]["matmul"] < 20
    assert record["entry"] == DEVICES["cpu"].name


def test_the_suite_names_its_models() -> None:
    """A model is found in the suite under its own name."""
    assert all(build().name == name for name, build in SUITE.items())
