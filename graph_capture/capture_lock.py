"""Let planned steps run side by side, and captures alone.

While a step is captured, PyTorch and Transformers are patched in places that all
threads share (global module hooks, checkpointing, ``is_compiling()``, the
allocator's record), and the model holds stand-ins. So one thread captures at a time, and
no planned step looks at its model or runs meanwhile. A forward pass without a plan does not
wait: a thread that makes one must not share the model with a thread that captures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_LONGEST_COURTESY_S = 0.1
"""How long a step lets a waiting capture go first. Not for ever: a running step may wait for it."""


class CaptureLock:
    """A lock that steps share and a capture has alone.

    Both may be entered again by the thread that has it. A thread that captures within a step
    of its own gives up its share meanwhile, so two such threads do not wait for each other.
    """

    def __init__(self) -> None:
        self._change = threading.Condition(threading.Lock())
        self._of_thread = threading.local()
        self._num_running = 0
        self._num_waiting = 0  # captures
        self._capturing: int | None = None  # identifier of the thread

    def __enter__(self) -> None:
        """Begin a step; wait while another thread captures."""
        mine = self._of_thread.__dict__
        depth = mine.get("depth", 0)
        if depth == 0 and self._capturing != threading.get_ident():
            self._take_share(courteous=True)
            mine["shares"] = True
        mine["depth"] = depth + 1

    def __exit__(self, *_error: object) -> None:
        mine = self._of_thread.__dict__
        mine["depth"] = max(mine["depth"] - 1, 0)
        if mine["depth"] == 0 and mine.pop("shares", False):
            self._give_share()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Give this thread's share up for a while, for what may wait for other threads."""
        mine = self._of_thread.__dict__
        if not mine.get("shares", False):
            yield
            return
        depth, mine["depth"], mine["shares"] = mine["depth"], 0, False
        self._give_share()
        try:
            yield
        finally:
            mine["depth"] = depth  # even if an interrupt ends the wait for a share
            self._take_share()
            mine["shares"] = True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other thread runs a step or captures, and keep them waiting."""
        mine = threading.get_ident()
        if self._capturing == mine:
            yield
            return
        with self.resting():
            with self._change:
                self._num_waiting += 1
                try:
                    while self._capturing is not None or self._num_running:
                        self._change.wait()
                    self._capturing = mine
                finally:
                    self._num_waiting -= 1
            try:
                yield
            finally:
                with self._change:
                    self._capturing = None
                    self._change.notify_all()

    def _take_share(self, *, courteous: bool = False) -> None:
        with self._change:
            if courteous and self._num_waiting:
                self._change.wait_for(lambda: not self._num_waiting, _LONGEST_COURTESY_S)
            while self._capturing is not None:
                self._change.wait()
            self._num_running += 1

    def _give_share(self) -> None:
        with self._change:
            self._num_running -= 1
            if self._num_waiting:
                self._change.notify_all()


CAPTURE_LOCK = CaptureLock()
"""Of this process."""


def holds_capture_lock(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function: no other thread captures or runs a planned step meanwhile."""

    @wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with CAPTURE_LOCK.alone():
            return function(*args, **kwargs)

    return waiting
