"""Random generators of Python's and NumPy's that a model holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_capture.errors import NotFittingError
from tests.capturing import trace_step

SHARED = np.random.default_rng(3)
HELD: dict[str, Callable[[], Any]] = {
    "python": lambda: random.Random(0),
    "numpy": lambda: np.random.default_rng(0),
    "numpy, old": lambda: np.random.RandomState(0),
}


class Dropped(nn.Module):
    """Skips its layer by a draw from a generator of its own, or from one of the module's."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.held = [held]

    def forward(self, x: Tensor) -> Tensor:
        draw = self.held[0].random() if self.held[0] else SHARED.random()
        return self.layer(x) if draw < 2 else x


def trace(model: nn.Module) -> None:
    trace_step(model, {"x": torch.ones(2, 4)}, loss=lambda output: output.sum())


@pytest.mark.parametrize("kind", HELD)
def test_draws_from_a_generator_that_a_model_holds_are_refused(kind: str) -> None:
    """One that is reached through an attribute."""
    with pytest.raises(NotFittingError, match=r"draws from 'held\[0\]'"):
        trace(Dropped(HELD[kind]()))


def test_draws_from_a_global_generator_are_refused() -> None:
    """One that the code names."""
    with pytest.raises(NotFittingError, match="draws from 'SHARED'"):
        trace(Dropped(None))


@pytest.mark.parametrize("kind", HELD)
def test_capturing_draws_nothing(kind: str) -> None:
    """The generator is where it was, even though forward has drawn."""
    model = Dropped(HELD[kind]())
    with pytest.raises(NotFittingError):
        trace(model)
    assert model.held[0].random() == HELD[kind]().random()


def test_numpys_global_generator_is_named() -> None:
    """Its module has members that cannot be written to, which are left alone."""

    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * np.random.uniform()

    with pytest.raises(NotFittingError, match="Python's or NumPy's"):
        trace(Shifted(4, 4))
