"""What measured times are kept under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graph_capture.costs import environment

NVIDIA = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025"


def on_a_card(monkeypatch: pytest.MonkeyPatch, *drivers: Path) -> dict[str, Any]:
    """The environment of a card, with drivers that are described in these files."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(environment, "_DRIVERS", drivers)
    found: dict[str, Any] = json.loads(environment.environment_of(torch.device("cuda")))
    return found


def test_times_of_a_card_are_kept_by_its_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The driver's own words are part of the key; the compiler in its second line is not."""
    (tmp_path / "nvidia").write_text(f"{NVIDIA}\nGCC version:  gcc version 12.2.0\n")
    assert on_a_card(monkeypatch, tmp_path / "nvidia", tmp_path / "amd")["driver"] == [NVIDIA]


def test_a_system_that_names_no_driver_has_a_key_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where no file says which driver runs, no driver is in the key."""
    assert on_a_card(monkeypatch, tmp_path / "nvidia")["driver"] == []


def test_the_processor_has_a_name_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without Linux's description of the processor, Python's is taken."""
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    assert environment.device_name(torch.device("cpu"))
