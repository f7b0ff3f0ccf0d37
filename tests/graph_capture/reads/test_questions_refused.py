"""Forward may not ask for what no plan could repeat."""

from __future__ import annotations

import os
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graph_capture.errors import CaptureError

from ..odd import Three
from .asking import asking, reads_of


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: float(uuid.uuid4().int % 97),
        lambda model: float(secrets.randbelow(97)),
        lambda model: float(os.urandom(1)[0]),
    ],
)
def test_numbers_without_a_seed_are_refused(ask: Callable[[Any], float]) -> None:
    """A plan would repeat them."""
    with pytest.raises(CaptureError, match=r"without a seed \(test_questions_refused\.py"):
        reads_of(asking(ask))


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: float(time.strftime("%S")) + float(time.strftime("%j")),
        lambda model: float(time.ctime()[-4:]),
        lambda model: float(time.asctime()[-4:]),
    ],
)
def test_written_dates_are_clocks(ask: Callable[[Any], float]) -> None:
    """As the numbers are that they are made of."""
    with pytest.raises(CaptureError, match="reads a clock"):
        reads_of(asking(ask))


class _Scaled(Three):
    def prepare(self) -> None:
        self.limit = 1.0
        self.c.register_full_backward_pre_hook(
            lambda module, g: (g[0] / max(self.limit, g[0].norm().item()),)
        )


class _ScaledByTensors(Three):
    def prepare(self) -> None:
        self.c.register_full_backward_pre_hook(
            lambda module, g: (g[0] * torch.clamp(1.0 / g[0].norm(), max=1),)
        )


def test_a_backward_hook_that_asks_has_advice_of_its_own() -> None:
    """It names the hook's line, and what it advises is planned."""
    with pytest.raises(CaptureError, match=r"backward hook.*test_questions_refused\.py:\d+.*clamp"):
        reads_of(_Scaled())
    reads_of(_ScaledByTensors())
