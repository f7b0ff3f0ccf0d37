"""What every test starts from: one thread and a known seed."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """One thread: bits do not depend on how the machine splits a sum, times are steadier."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed of the global generator, set before each test."""
    torch.manual_seed(0)
    return 0


_PREVIOUS_MODULE = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before each test, what was imported is frozen; ``gpu`` tests are skipped without a device.

    Each measurement collects garbage, which took half of all tests' time before: libraries
    have a million objects. A capture undoes the freezing where it must.
    """
    global _PREVIOUS_MODULE
    if item.location[0] != _PREVIOUS_MODULE:
        _PREVIOUS_MODULE = item.location[0]
        gc.collect()
        gc.freeze()
    elif not gc.get_freeze_count():
        gc.freeze()
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
