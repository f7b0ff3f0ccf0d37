"""Branches on values that are known before the step runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graph_capture.errors import CaptureError
from tests.capturing import capture_step


class _Branching(nn.Module):
    """Takes a branch on what ``decide`` makes of its input."""

    def __init__(self, decide: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.decide = decide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y.relu().sum() if self.decide(x) else y.tanh().sum()


def _targets(decide: Any) -> set[str]:
    sample = torch.ones(3, 4, device="meta")  # only constants have values
    captured = capture_step(_Branching(decide), {"x": sample}, measure_scratch=False)
    return {op.target for op in captured.graph.operators}


def _counted(x: torch.Tensor) -> Any:
    positions = torch.arange(x.shape[0], device=x.device)
    return (torch.diff(positions) == 1).all()


def test_a_branch_on_counted_positions_is_eagers() -> None:
    """What is computed from a factory alone decides a branch as in eager."""
    assert any("relu" in t for t in _targets(_counted))
    assert any("tanh" in t for t in _targets(lambda x: ~_counted(x)))


def test_a_known_tensor_that_is_written_to_is_unknown() -> None:
    """Writing an input's values into a constant ends the knowledge of it."""

    def decide(x: torch.Tensor) -> Any:
        flag = torch.zeros(3, 4)
        flag.copy_(x)
        return flag.all()

    with pytest.raises(CaptureError, match="value"):
        _targets(decide)


def test_a_write_through_a_view_is_seen() -> None:
    """A view shares the memory of a known tensor, and its fate."""

    def decide(x: torch.Tensor) -> Any:
        flag = torch.zeros(3, 4)
        flag[1].copy_(x[1])
        return flag.all()

    with pytest.raises(CaptureError, match="value"):
        _targets(decide)


def test_memory_that_was_exchanged_is_not_known() -> None:
    """After ``x.data = …`` a tensor has another value, though it is the same object."""

    def decide(x: torch.Tensor) -> Any:
        flag = torch.zeros(4)
        flag.data = x[0]
        return flag.all()

    with pytest.raises(CaptureError):
        _targets(decide)


def test_what_depends_on_an_input_without_values_is_not_known() -> None:
    """An input on meta decides no branch, and the error says that it has no values."""
    for decide in (lambda x: x.all(), lambda x: torch.zeros_like(x).all()):
        with pytest.raises(CaptureError, match="on meta"):
            _targets(decide)


def test_a_tensor_that_changes_its_shape_in_place_has_its_value() -> None:
    """After ``squeeze_`` the remembered value has another shape; the graph still says which."""

    def decide(x: torch.Tensor) -> Any:
        flag = torch.ones(1, 1)
        flag.squeeze_()
        return flag

    assert any("relu" in t for t in _targets(decide))


@pytest.mark.parametrize("use_cache", [True, False])
def test_causal_masks_are_dropped_as_in_eager(use_cache: bool) -> None:
    """LLaMA without padding runs causal attention, not attention with a mask."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=use_cache,
    )
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.zeros(2, 8, dtype=torch.long)
    step = capture_step(model, {"input_ids": ids, "labels": ids}, measure_scratch=False).step
    assert not step.branch_free
    attention = [n for n in step.graph.nodes if "flash_attention_for_cpu.default" in str(n.target)]
    assert [n.args[4] for n in attention] == [True]  # is_causal


class _CountingAndBranching(nn.Module):
    """Counts its calls, once, and asks for the value of positions that it has just counted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.built = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.built = 1  # another number after the first call, the same after the second
        positions = torch.arange(x.shape[0])
        return self.linear(x).sin() if bool((positions >= 0).all()) else self.linear(x).cos()


def test_the_second_forward_knows_what_the_first_knew() -> None:
    """A forward that runs again because a number changed takes the same branch."""
    arguments = {"x": torch.ones(3, 4)}
    step = capture_step(_CountingAndBranching(), arguments, loss=torch.sum).step
    assert not step.branch_free
    assert any("sin" in str(node.target) for node in step.graph.nodes)
