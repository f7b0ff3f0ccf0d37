"""torch.utils.checkpoint, called through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint as implementation
from torch.utils.checkpoint import checkpoint

from graph_capture.tracing.checkpointing import (
    checkpoints_inlined,
    checkpoints_noticed,
    inside_checkpoint,
)


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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_arguments_without_gradients_leave_parameters_without() -> None:
    """The older implementation is a function of its arguments, here as without a plan."""
    layer, x = torch.nn.Linear(3, 3), torch.ones(2, 3)
    assert not checkpoint(layer, x, use_reentrant=True).requires_grad
    with checkpoints_inlined():
        assert not checkpoint(layer, x, use_reentrant=True).requires_grad
        assert checkpoint(layer, x, use_reentrant=False).requires_grad
        assert checkpoint(layer, x.clone().requires_grad_(), use_reentrant=True).requires_grad


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


@pytest.mark.parametrize("context", [checkpoints_inlined, checkpoints_noticed])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_code_knows_that_it_is_checkpointed(use_reentrant: bool, context: Any) -> None:
    """Inside a part and not after it, also where a part ends with an error."""
    seen: list[bool] = []

    def part(x: torch.Tensor) -> torch.Tensor:
        seen.append(inside_checkpoint())
        return x * 2

    def failing(_x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    x = torch.ones(3, requires_grad=True)
    with context():
        checkpoint(part, x, use_reentrant=use_reentrant)
        seen.append(inside_checkpoint())
        with pytest.raises(KeyboardInterrupt) as caught:
            checkpoint(failing, x, use_reentrant=use_reentrant)
    seen.append(inside_checkpoint())
    del caught
    assert seen == [True, False, False]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_noticed_checkpoint_still_runs_twice(use_reentrant: bool) -> None:
    """In forward and in backward, as without anybody looking."""
    runs: list[bool] = []

    def part(x: Any) -> Any:
        runs.append(inside_checkpoint())
        return torch.tanh(x).exp()

    x = torch.ones(3, requires_grad=True)
    with checkpoints_noticed():
        checkpoint(part, x, use_reentrant=use_reentrant).sum().backward()
    assert runs == [True, False]
