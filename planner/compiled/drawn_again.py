"""Calls of a compiled graph that read the random generator, and draw from an earlier state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..running.generators import READS, RESUMES, REWINDS, PutRightOnError


def read_state(device_type: str) -> torch.Tensor:
    """Return the state of the default generator, uint8, in host memory."""
    return READS[device_type](*_place(device_type))


def draw_again(state: torch.Tensor, draw: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Draw from an earlier state of the generator, and leave the generator as it is."""
    given = next((a.device for a in args if isinstance(a, torch.Tensor)), kwargs.get("device"))
    device_type = torch.device("cpu" if given is None else given).type
    where = _place(device_type)
    with PutRightOnError():
        before = REWINDS[device_type](state, *where)
        drawn = draw(*args, **kwargs)
        RESUMES[device_type](before, *where)
    return drawn


def _place(device_type: str) -> tuple[torch.device, ...]:
    return (torch.device("cuda", torch.cuda.current_device()),) if device_type == "cuda" else ()


__all__ = ["draw_again", "read_state"]
