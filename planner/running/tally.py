"""What a planned model has done so far, and what it has said about it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from ..errors import PlanWarning

_NOT_THE_LOOP = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<")


class Tally:
    """Counts of one planned model, shared by all plans that were made for its calls.

    Attributes
    ----------
    num_planned, num_unplanned
        Training calls by a plan, and by the model's own forward.
    num_backward
        Backward passes that came to a plan.
    last_mismatch
        Why the last call that was not by a plan was not the planned one.
    """

    def __init__(self) -> None:
        self.num_planned = self.num_unplanned = self.num_backward = 0
        self.last_mismatch: str | None = None
        self._said: set[str] = set()

    @property
    def num_expected(self) -> int:
        """How many times at most a gradient has arrived that is accounted for."""
        return self.num_unplanned + self.num_backward

    def say(self, kind: str, text: str) -> None:
        """Warn with ``text``, unless a warning of this kind was given before."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, PlanWarning, stacklevel=_levels_to_the_loop())


def _levels_to_the_loop() -> int:
    """How far up the first caller is that is neither this package nor PyTorch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_LOOP):
        frame, level = frame.f_back, level + 1
    return level
