"""Random generators while a step is recorded: it draws from PyTorch's default ones, in turn.

A plan draws what the step draws, in the same order, and nothing else. So other
generators, states that somebody sets, and draws that no call of the step has made are
found while the step is recorded.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..calls.call_places import calling_line
from ..errors import CaptureError
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.trees import tree_iter
from ..reads.isolation import generator_states
from .drawn_ahead import is_ahead


class WatchedGenerators:
    """The generators' states after the draws so far.

    Attributes
    ----------
    draws_outside
        A module that drew from Python's or NumPy's global generator; ``None`` if none did.
    """

    def __init__(self) -> None:
        self.draws_outside: str | None = None
        self._states = generator_states()
        self._outside = _outside_generators()

    def draw(self) -> None:
        """Draw in the place of a call, so that a state put back later differs from this one."""
        with disable_current_modes():
            torch.rand(())
            if torch.cuda.is_initialized():
                for generator in torch.cuda.default_generators:
                    generator.set_offset(generator.get_offset() + 4)
            self._states = generator_states()

    def check(self, phase: str) -> None:
        """Refuse code that sets the state of torch's generators, even to an earlier state.

        Raises
        ------
        CaptureError
            When a generator's state is not the one after the last draw.
        """
        with disable_current_modes():
            pairs = [*zip(generator_states(), self._states, strict=True)]
            moved = [(now, then) for now, then in pairs if not np.array_equal(now, then)]
            ahead = bool(moved) and all(is_ahead(now, then) for now, then in moved)
        if ahead:
            raise CaptureError(
                f"random numbers were drawn from PyTorch's global generator while the model was "
                f"captured ({phase}, {calling_line()}), and by no call of the model in this "
                "thread: another thread draws (a data loader, a second training loop), or code "
                "that is not PyTorch's. A plan cannot draw as eager does then, and planning puts "
                "the generator back: wait for that thread while planning, or let it draw from a "
                "torch.Generator of its own"
            )
        if moved:
            raise CaptureError(
                f"{phase} seeds the random generator and then draws from it, or puts back an "
                f"earlier state ({calling_line()}): seed outside, or draw outside and pass the "
                "numbers as an argument. A checkpoint of the model's own does so: switch it off, "
                "since the plan decides what is recomputed, or use torch.utils.checkpoint, which "
                "is looked through"
            )

    def look_outside(self, module_path: str) -> None:
        """Note the module, if Python's or NumPy's global generator was drawn from."""
        if self.draws_outside is None and _outside_generators() != self._outside:
            self.draws_outside = module_path


def refuse_other_generators(args: tuple, kwargs: dict) -> None:
    """Refuse a generator that a call is given: a step draws one sequence, from the default one."""
    if any(isinstance(v, torch.Generator) for v in tree_iter((args, kwargs))):
        raise CaptureError(
            f"random numbers are drawn from a generator of the model's own ({calling_line()}); "
            "use the default generator, or draw outside and pass the numbers as an argument"
        )


def _outside_generators() -> tuple[Any, ...]:
    """State of Python's and NumPy's random generators."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = numpy_state["state"]
    return random.getstate(), inner["key"].tobytes(), inner["pos"]


__all__ = ["WatchedGenerators", "refuse_other_generators"]
