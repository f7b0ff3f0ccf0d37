"""Stand-ins for the tensors of a module that is in the middle of a training."""

from __future__ import annotations

import torch
from torch import nn

from graph_capture import capture


def test_a_gradient_of_a_former_size_is_let_be() -> None:
    """Where embeddings are resized, ``zero_grad`` may come after the next forward pass."""
    model, x = nn.Linear(4, 4), torch.ones(2, 4)
    model(x).sum().backward()
    model.weight.data, model.bias.data = torch.ones(8, 4), torch.ones(8)
    capture(model, x)
    assert model.weight.grad is not None
    assert model.weight.grad.shape == (4, 4)
