"""torch.utils.checkpoint, called through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint as implementation
from torch.utils.checkpoint import checkpoint

from graph_capture.checkpointing import checkpoints_inlined


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_part_runs_once(use_reentrant: bool) -> None:
    """Inside, a checkpointed part runs once in forward and not again in backward."""
    runs: list[int] = []

    def part(x: Any) -> Any:
        runs.append(1)
        return torch.tanh(x).exp()

    x = torch.ones(3, requires_grad=True)
    with checkpoints_inlined():
        checkpoint(part, x, use_reentrant=use_reentrant).sum().backward()
    assert len(runs) == 1
    assert x.grad is not None


def test_afterwards_it_is_itself_again() -> None:
    """Both implementations are back afterwards, also when an error passes."""
    before = (
        implementation.CheckpointFunction,
        implementation._checkpoint_without_reentrant_generator,
    )
    with pytest.raises(RuntimeError), checkpoints_inlined():
        raise RuntimeError
    assert before == (
        implementation.CheckpointFunction,
        implementation._checkpoint_without_reentrant_generator,
    )
