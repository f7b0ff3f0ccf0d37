"""What every test starts from: one thread and a known seed."""

from __future__ import annotations

import gc
import time
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
    """Seed of the global generators, set before each test."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which writes down the call's whole stack for each kind of device that is not there
        torch.default_generator.manual_seed(0)
    return 0


SLOW_COLLECTION_S = 0.05


class _Collections:
    """Freezes what was imported once a full collection of garbage has taken long.

    Measurements collect garbage, which took up to half of the tests' time: libraries have a
    million objects. A capture undoes the freezing where it must.
    """

    def __init__(self) -> None:
        self._began_s, self._slow = 0.0, False
        gc.callbacks.append(self._note)

    def freeze_after_a_slow_one(self) -> None:
        if self._slow:
            gc.freeze()
            self._slow = False

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:
            return
        if phase == "start":
            self._began_s = time.perf_counter()
        elif time.perf_counter() - self._began_s > SLOW_COLLECTION_S:
            self._slow = True


_COLLECTIONS = _Collections()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` are skipped where there is no CUDA device."""
    _COLLECTIONS.freeze_after_a_slow_one()
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
