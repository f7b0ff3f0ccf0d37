"""Threads that capture wait for one another, and for steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from graph_capture.capture_lock import CaptureLock
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


def _in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def _captures(lock: CaptureLock, begun: threading.Event) -> Callable[[], None]:
    def run() -> None:
        with lock.alone():
            begun.set()

    return run


def test_a_capture_waits_for_a_running_step_of_another_thread() -> None:
    """It begins when the step ends, and not before."""
    lock, begun = CaptureLock(), threading.Event()
    with lock:
        thread = _in_thread(_captures(lock, begun))
        assert not begun.wait(0.05)
    assert begun.wait(5)
    thread.join(5)


def test_a_step_waits_for_a_capture_of_another_thread() -> None:
    """It begins when the capture ends, and not before."""
    lock, begun = CaptureLock(), threading.Event()

    def step() -> None:
        with lock:
            begun.set()

    with lock.alone(), lock.alone(), lock:  # the thread itself may enter again
        thread = _in_thread(step)
        assert not begun.wait(0.05)
    assert begun.wait(5)
    thread.join(5)


def test_two_steps_that_capture_do_not_wait_for_each_other() -> None:
    """Each gives its share up while the other captures."""
    lock, both = CaptureLock(), threading.Barrier(2, timeout=5)

    def step() -> None:
        with lock, lock:
            both.wait()
            with lock.alone():
                pass

    threads = [_in_thread(step), _in_thread(step)]
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    with lock.alone():  # no share is left over
        pass


def test_a_step_that_waits_for_another_thread_lets_it_capture() -> None:
    """``resting`` gives the share up, and takes it again."""
    lock, begun = CaptureLock(), threading.Event()
    with lock:
        with lock.resting():
            _in_thread(_captures(lock, begun)).join(5)
        assert begun.is_set()
        begun.clear()
        thread = _in_thread(_captures(lock, begun))
        assert not begun.wait(0.05)
    thread.join(5)


def test_a_waiting_capture_does_not_stop_steps_for_ever() -> None:
    """A running step may wait for a step that begins later."""
    lock, begun = CaptureLock(), threading.Event()

    def step() -> None:
        with lock:
            begun.set()

    with lock:
        thread = _in_thread(_captures(lock, threading.Event()))
        _in_thread(step)
        assert begun.wait(5)
    thread.join(5)


def test_an_interrupt_while_a_share_is_taken_again_leaves_the_lock_usable() -> None:
    """Ctrl-C in a notebook, which goes on with the same thread."""
    lock, begun = CaptureLock(), threading.Event()
    take = lock._take_share

    def interrupted(**_options: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lock, lock.resting():
        lock._take_share = interrupted  # type: ignore[method-assign]
    lock._take_share = take  # type: ignore[method-assign]
    with lock:
        thread = _in_thread(_captures(lock, begun))
        assert not begun.wait(0.05)  # the step has its share again
    assert begun.wait(5)
    thread.join(5)
