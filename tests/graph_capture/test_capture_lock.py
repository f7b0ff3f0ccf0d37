"""Threads that capture wait for one another."""

from __future__ import annotations

import queue
import threading

import torch
from torch import nn

from graph_capture.step_capture import capture


class _Meeting(nn.Linear):
    """Says that its forward runs, and waits a moment for the other's."""

    def __init__(self, mine: threading.Event, other: threading.Event) -> None:
        super().__init__(2, 2)
        self.events = (mine, other)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mine, other = self.events
        mine.set()
        met.put(other.wait(0.3))
        mine.clear()
        return super().forward(x)


met: queue.SimpleQueue[bool] = queue.SimpleQueue()  # forward may not append to a list


def test_two_threads_capture_one_after_the_other() -> None:
    """Neither forward runs while the other does, and both graphs are those of one thread."""
    alone = capture(nn.Linear(2, 2), torch.ones(1, 2), loss_fn=torch.sum)
    first, second = threading.Event(), threading.Event()
    models = [_Meeting(first, second), _Meeting(second, first)]
    found: list[str] = []

    def run(model: nn.Module) -> None:
        found.append(capture(model, torch.ones(1, 2), loss_fn=torch.sum).fingerprint)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [met.get_nowait() for _ in range(2)] == [False, False]
    assert found == [alone.fingerprint] * 2
