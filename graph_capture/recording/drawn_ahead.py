"""Distinguish drawing numbers from a generator from setting its state."""

from __future__ import annotations

import numpy as np
import torch

_WORDS = slice(24, 24 + 624 * 8)  # of PyTorch's Mersenne twister, behind seed and position
_NEXT = slice(16, 24)  # the position in them
_NUM_WORDS = 624
_MAX_BLOCKS = 20_000
"""The search ends after some twelve million numbers, which take a fifth of a second."""


def is_ahead(now: np.ndarray, then: np.ndarray) -> bool:
    """Whether drawing alone takes a PyTorch generator from one state to another.

    Parameters
    ----------
    now, then
        As :func:`~.isolation.generator_states` returns them. 16 bytes are the seed and
        offset of a CUDA device; anything else is the CPU's state.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(7)
    >>> then = generator.get_state().numpy().copy()
    >>> _ = torch.rand(1000, generator=generator)
    >>> now = generator.get_state().numpy().copy()
    >>> is_ahead(now, then), is_ahead(then, now), is_ahead(now, now)
    (True, False, False)
    """
    if now.shape != then.shape:
        return False
    if now.nbytes == 16:
        (seed, offset), (seed_then, offset_then) = now.view(np.uint64), then.view(np.uint64)
        return bool(seed == seed_then and offset > offset_then)
    if np.array_equal(now[_WORDS], then[_WORDS]):
        return int(now[_NEXT].view(np.uint64)[0]) > int(then[_NEXT].view(np.uint64)[0])
    twin = torch.Generator()
    twin.set_state(torch.from_numpy(then.copy()))
    wanted = now[_WORDS].tobytes()
    for _ in range(_MAX_BLOCKS):
        torch.rand(_NUM_WORDS, generator=twin)  # takes a word for each number
        if twin.get_state().numpy()[_WORDS].tobytes() == wanted:
            return True
    return False
