"""Tensors that are not dense are refused, with advice that works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from graph_capture.errors import CaptureError

from ..odd import WIDTH, Three, normal, plan_of


class Graph(Three):
    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.c(torch.sparse.mm(adjacency, self.a(x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("convert", ["to_sparse_coo", "to_sparse_csr"])
def test_a_sparse_argument_is_refused(convert: str) -> None:
    """Before anything is traced, with what to do."""
    adjacency = getattr(torch.eye(16), convert)()
    with pytest.raises(CaptureError, match=r"tensor of layout torch.sparse.*to_dense\(\)"):
        plan_of(Graph(), (normal(0, 16, WIDTH), adjacency))
    plan_of(Graph(), (normal(0, 16, WIDTH), adjacency.to_dense()))


class Recurrent(nn.Module):
    """Packs what it is given padded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        packed = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True)
        return self.layer(packed)[0].data


def test_a_packed_argument_is_refused_and_the_advice_works() -> None:
    """Packed in forward it is planned."""
    x, lengths = normal(0, 2, 4, WIDTH), torch.tensor([4, 2])
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    with pytest.raises(CaptureError, match=r"PackedSequence.*pack them in forward"):
        plan_of(Recurrent(), (packed,))
    plan_of(Recurrent(), (x, lengths))
