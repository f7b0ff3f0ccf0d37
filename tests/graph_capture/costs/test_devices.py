"""The device table, and which entry is the card at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from graph_capture.costs.detect_gpu import device_from_properties
from graph_capture.costs.devices import DEVICES, Device, device_for
from graph_capture.costs.operator_classes import OPERATOR_CLASSES
from graph_capture.costs.target import target_of

GPUS = {device.name: device for device in DEVICES.values() if device.torch_type == "cuda"}


@dataclass
class Properties:
    """What torch says of a card, by default of an A100 with 80 GB."""

    major: int = 8
    minor: int = 0
    multi_processor_count: int = 108
    total_memory: int = 85_000_000_000
    clock_rate: int = 1_410_000
    memory_clock_rate: int = 1_593_000
    memory_bus_width: int = 5120


def _fake_card(
    monkeypatch: pytest.MonkeyPatch, name: str, properties: object | None = None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties or Properties())


def test_the_cpu_has_an_entry() -> None:
    """Everything that is no CUDA device takes the entry of the CPU."""
    assert device_for("cpu") is DEVICES["cpu"]


@pytest.mark.parametrize(
    ("card", "entry"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA A100-PCIE-40GB", "a100_40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_card_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, card: str, entry: str
) -> None:
    """Names as torch.cuda.get_device_name() spells them lead to their entries."""
    _fake_card(monkeypatch, card)
    assert device_for("cuda") is DEVICES[entry]


@pytest.mark.parametrize(
    "card",
    [
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_name_within_another_is_another_card(monkeypatch: pytest.MonkeyPatch, card: str) -> None:
    """Relatives with other rates do not get the entry that their name contains."""
    _fake_card(monkeypatch, card)
    device = device_for("cuda")
    assert device.title == card
    assert device not in GPUS.values()


def test_an_unknown_card_is_described_by_its_clocks() -> None:
    """The clocks of an A100 give its data sheet's peaks, those of an RTX 4090 its own."""
    device = device_from_properties("NVIDIA A100X", Properties())
    sheet = DEVICES["a100"]
    for dtype, rate in sheet.flops_per_s.items():
        assert device.flops_per_s[dtype] == pytest.approx(rate, rel=0.005), dtype
    assert device.tf32_flops_per_s == pytest.approx(sheet.tf32_flops_per_s, rel=0.005)
    assert device.bytes_per_s == pytest.approx(sheet.bytes_per_s, rel=0.005)
    assert device.memory_bytes == 85_000_000_000
    ada = Properties(8, 9, 128, 25_300_000_000, 2_520_000, 10_501_000, 384)
    device = device_from_properties("NVIDIA GeForce RTX 4090 D", ada)
    sheet = DEVICES["rtx4090"]
    for dtype, rate in sheet.flops_per_s.items():
        assert device.flops_per_s[dtype] == pytest.approx(rate, rel=0.005), dtype
    assert device.bytes_per_s == pytest.approx(sheet.bytes_per_s, rel=0.005)


def test_the_rates_per_clock_give_the_peaks_of_hopper_and_blackwell() -> None:
    """132 multiprocessors at 1.83 GHz and 148 at 1.86 GHz are the data sheets' tensor peaks."""
    hopper = device_from_properties("other", Properties(9, 0, 132, 1, 1_830_000, 2_619_000, 5120))
    assert hopper.flops_rate(torch.bfloat16) == pytest.approx(989.4e12, rel=0.005)
    assert hopper.flops_rate(torch.float8_e4m3fn) == pytest.approx(1978.9e12, rel=0.005)
    assert hopper.bytes_per_s == pytest.approx(3.35e12, rel=0.005)
    assert hopper.library_workspace_bytes == 32 * 1024**2
    blackwell = device_from_properties("other", Properties(10, 0, 148, 1, 1_860_000, 1, 1))
    assert blackwell.flops_rate(torch.bfloat16) == pytest.approx(2250e12, rel=0.005)


@pytest.mark.parametrize(
    ("card", "properties", "reason"),
    [
        ("NVIDIA Rubin", Properties(major=99), "compute capability 99.0"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", Properties(), "slice of a card"),
        ("NVIDIA T4000", object(), "does not report its major"),
    ],
)
def test_a_card_that_nothing_is_known_of_is_refused(
    monkeypatch: pytest.MonkeyPatch, card: str, properties: object, reason: str
) -> None:
    """The error names the card, the reason and the way out; no other card is taken for it."""
    _fake_card(monkeypatch, card, properties)
    with pytest.raises(ValueError, match=f"{card}.*{reason}.*device=Device"):
        device_for("cuda")


def test_without_a_card_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No card is made up where there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no CUDA device is present.*h100"):
        device_for("cuda")


def test_a100_has_two_names() -> None:
    """``a100_80`` says the size that ``a100`` has."""
    assert DEVICES["a100_80"] is DEVICES["a100"]
    assert DEVICES["a100"].name == "a100"


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_has_all_its_figures(name: str) -> None:
    """Rates of the usual dtypes in plausible order, sizes, an efficiency of each class."""
    device = GPUS[name]
    rate = device.flops_per_s
    assert rate[torch.float64] <= rate[torch.float32] < rate[torch.bfloat16]
    assert rate[torch.bfloat16] == rate[torch.float16]
    if device.tf32_flops_per_s is not None:
        assert rate[torch.float32] <= device.tf32_flops_per_s <= rate[torch.bfloat16]
    assert device.memory_bytes is not None
    assert device.memory_bytes >= 24 * 10**9
    assert device.library_workspace_bytes >= 8_519_680
    assert set(device.efficiency) == set(OPERATOR_CLASSES)
    assert all(0 < share < 1 for share in device.efficiency.values())
    assert device.source


def test_tf32_counts_only_for_float32_where_allowed() -> None:
    """TF32 replaces the rate of float32 and no other."""
    a100 = DEVICES["a100"]
    assert a100.flops_rate(torch.float32) == 19.5e12
    assert a100.flops_rate(torch.float32, tf32=True) == 156e12
    assert a100.flops_rate(torch.float64, tf32=True) == 19.5e12
    assert DEVICES["mi300x"].flops_rate(torch.float32, tf32=True) == 163.4e12


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch_type": "xla"}, "torch_type is 'cpu' or 'cuda'"),
        ({"flops_per_s": {torch.bfloat16: 1e12}}, "lacks torch.float32"),
        ({"efficiency": {"matmuls": 0.5}}, "no operator class matmuls; known are matmul"),
        ({"efficiency": {"matmul": 0.0}}, "positive"),
        ({"bytes_per_s": -1.0}, "positive"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused(change: dict, reason: str) -> None:
    """The constructor checks what the roofline divides by."""
    with pytest.raises(ValueError, match=reason):
        replace(DEVICES["cpu"], **change)


def test_a_device_of_ones_own_stands_for_the_one_at_hand_under_its_name() -> None:
    """Other figures under the name of the device at hand leave it at hand, another name not."""
    model, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    own = replace(DEVICES["cpu"], launch_ns=1)
    assert target_of(model, [x], own).at_hand
    assert target_of(model, [x], own).device.launch_ns == 1
    assert not target_of(model, [x], replace(own, name="mine")).at_hand


def test_a_device_can_be_built_from_rates_alone() -> None:
    """Sizes, efficiencies and sources need not be known."""
    device = Device(
        name="mine",
        title="my card",
        torch_type="cuda",
        flops_per_s={torch.float32: 1e12},
        bytes_per_s=1e11,
        launch_ns=5_000,
    )
    assert device.memory_bytes is None
    assert device.flops_rate(torch.bfloat16) == 1e12
