"""Count what a planned model has done so far, and give each warning once."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..errors import PlanWarning
from .autograd_chain import StepCall

_NOT_THE_LOOP = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<")


class Tally:
    """Counts of one planned model, shared by all plans that were made for its calls.

    Attributes
    ----------
    num_planned, num_unplanned
        Training calls by a plan, and by the model's own forward.
    last_mismatch
        How the last call that no plan ran differed from the planned call.
    peak_bytes
        The highest predicted peak of the steps that ran by a plan.
    waiting
        Calls whose backward pass has not run, of all plans.
    num_captures, capture_s
        Plans made for other calls while the loop waited, and the seconds that they took.
    """

    def __init__(self) -> None:
        self.num_planned = self.num_unplanned = 0
        self._num_backward: Counter[int] = Counter()  # by thread
        self.last_mismatch: str | None = None
        self.peak_bytes = 0
        self.num_captures = 0
        self.capture_s = 0.0
        self._said: set[str] = set()
        self.waiting: weakref.WeakSet[StepCall] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "waiting": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, waiting=weakref.WeakSet())

    def ran(self, peak_bytes: int) -> None:
        """Count a training call by a plan with this predicted peak."""
        self.num_planned += 1
        if peak_bytes > self.peak_bytes:
            self.peak_bytes = peak_bytes

    def captured(self, taken_s: float) -> None:
        """Count a plan for another call."""
        self.num_captures += 1
        self.capture_s += taken_s

    def ran_backward(self) -> None:
        """Count a backward pass that reached a plan."""
        self._num_backward[threading.get_ident()] += 1

    @property
    def num_backward(self) -> int:
        """Backward passes that reached a plan."""
        return sum(self._num_backward.values())

    @property
    def num_expected(self) -> int:
        """The most arrivals of gradients in this thread that known backward passes account for.

        Another thread's backward pass may be under way, and its gradients arrive there.
        """
        return self.num_unplanned + self._num_backward[threading.get_ident()]

    def say(self, kind: str, text: str) -> None:
        """Warn with ``text``, unless a warning of this kind was given before."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, PlanWarning, stacklevel=_levels_to_the_loop())


def _levels_to_the_loop() -> int:
    """The stack level of the first caller outside this package and PyTorch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_LOOP):
        frame, level = frame.f_back, level + 1
    return level
