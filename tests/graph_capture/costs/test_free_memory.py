"""What a device has left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph_capture.costs import free_memory
from graph_capture.costs.free_memory import free_bytes

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's own files, with 8 GB available."""
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    return tmp_path


def test_what_the_kernel_calls_available(system: Path) -> None:
    """Without a container it is the kernel's figure, in units of 1024 bytes."""
    assert free_bytes(CPU) == 8_000_000 * 1024


def test_a_container_may_have_less(system: Path) -> None:
    """Limit 5 GB, 3 GB used of which 1 GB is file cache that can be dropped: 3 GB are left."""
    (system / "memory.max").write_text("5000000000\n")
    (system / "memory.current").write_text("3000000000\n")
    (system / "memory.stat").write_text("anon 2000000000\ninactive_file 1000000000\n")
    assert free_bytes(CPU) == 3 * 10**9
    (system / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 8_000_000 * 1024


def test_without_the_kernel_s_word(system: Path) -> None:
    """Elsewhere than on Linux it is half of the machine's memory, or nothing is known."""
    (system / "meminfo").unlink()
    free = free_bytes(CPU)
    assert free is None or free > 0
