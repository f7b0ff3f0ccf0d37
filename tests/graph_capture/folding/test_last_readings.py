"""What is read of a memory after a call that writes to it."""

from __future__ import annotations

import random

import torch

from graph_capture.folding.last_readings import lies_within


def _view(whole: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Some slices, steps and transpositions of a tensor."""
    view = whole
    for _ in range(rng.randint(0, 3)):
        d = rng.randrange(view.dim())
        start = rng.randrange(view.shape[d])
        stop = rng.randint(start + 1, view.shape[d])
        index = [slice(None)] * view.dim()
        index[d] = slice(start, stop, rng.choice([1, 1, 2]))
        view = view[tuple(index)]
        if rng.random() < 0.3:
            view = view.transpose(0, rng.randrange(view.dim()))
    return view


def test_no_element_is_forgotten() -> None:
    """Of 3,000 pairs of views, none is said to lie in another that has an element outside."""
    rng = random.Random(0)
    said = 0
    for _ in range(3000):
        memory = torch.arange(4 * 6 * 5).view(4, 6, 5)
        part, whole = _view(memory, rng), _view(memory, rng)
        if lies_within(part, whole):
            said += 1
            assert set(part.flatten().tolist()) <= set(whole.flatten().tolist())
    assert said > 300


def test_tiles_of_a_buffer() -> None:
    """Rows of a tile lie in it, those beside it do not."""
    buffer = torch.zeros(8, 32)
    tile = buffer[:, :16]
    assert lies_within(tile[2:4], tile)
    assert lies_within(tile.t(), tile)
    assert lies_within(buffer.view(-1)[:40], buffer)
    assert not lies_within(buffer[:, 15:17], tile)
    assert not lies_within(buffer, tile)
