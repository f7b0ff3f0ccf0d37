"""Where a stand-in lies in memory is asked by PyTorch only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from graph_capture import capture
from graph_capture.errors import CaptureError

from ..odd import WIDTH, Three, mean_square, normal


class Addressed(Three):
    """Looks whether two tensors share memory by their addresses."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h.relu() if self.address(h) == self.address(x) else h.tanh()

    def address(self, x: Tensor) -> int:
        return x.data_ptr()


class AddressedStorage(Addressed):
    def address(self, x: Tensor) -> int:
        return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", [Addressed, AddressedStorage])
def test_an_address_is_refused(kind: type[nn.Module]) -> None:
    """Stand-ins have none: all would lie in one place, and another way would be taken."""
    with pytest.raises(CaptureError, match="asks for the address of a tensor"):
        capture(kind().train(), normal(0, 16, WIDTH), loss_fn=mean_square)
    assert "data_ptr" not in vars(Tensor)
    assert torch.ones(1).data_ptr()


class Copied(Three):
    """Copies a layer in each call."""

    def forward(self, x: Tensor) -> Tensor:
        return copy.deepcopy(self.a)(x) + self.b(x)


def test_pytorch_may_ask_for_addresses() -> None:
    """A copy of a parameter is one of its stand-in."""
    capture(Copied().train(), normal(0, 16, WIDTH), loss_fn=mean_square)
