"""Made-up values with which calls run that refuse zeros or take memory by what they select."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from graph_capture.costs.allocator import peak_extra_bytes
from graph_capture.costs.blank_values import fills_of
from graph_capture.costs.cost_model import Call
from graph_capture.costs.workspace import WorkspaceProbe

aten = torch.ops.aten
MATRICES = torch.rand(3, 8, 8) + 8 * torch.eye(8)
SOME = (torch.arange(32) < 12)[:, None].expand(32, 8)  # of images among tokens
LU = torch.linalg.lu_factor(MATRICES)

CALLS: list[tuple[Any, tuple]] = [
    (aten.lu_unpack.default, (LU.LU, LU.pivots)),
    (aten.linalg_lu_solve.default, (LU.LU, LU.pivots, torch.rand(3, 8, 2))),
    (aten.masked_scatter.default, (torch.rand(32, 8), torch.ones(32, 8) > 0, torch.rand(256))),
    (aten.masked_scatter_backward.default, (torch.rand(32, 8), torch.ones(32, 8) > 0, [256])),
    (aten.masked_scatter.default, (torch.rand(32, 8), SOME, torch.rand(96))),
    (aten.masked_scatter_backward.default, (torch.rand(32, 8), SOME, [12, 8])),
    (aten.multinomial.default, (torch.rand(8, 32), 4)),
    (aten.binary_cross_entropy_backward.default, (torch.ones(()), torch.rand(8), torch.rand(8))),
    (aten.ldexp.Tensor, (torch.rand(32, 8), torch.rand(32, 8))),
    (
        aten._ctc_loss.Tensor,
        (
            torch.rand(8, 4, 16).log_softmax(-1),
            torch.ones(4, 3, dtype=torch.long),
            torch.full((4,), 8),
            torch.full((4,), 3),
        ),
    ),
]


@pytest.mark.parametrize(("func", "args"), CALLS, ids=lambda x: str(x) if callable(x) else "")
def test_scratch_is_as_with_real_values(func: Any, args: tuple) -> None:
    """The probe runs the call on values that it takes, and finds at least what it really takes."""
    out = func(*args)
    probe = WorkspaceProbe("cpu", at_hand=True)
    found = probe.bytes_of(Call(func=func, args=args, kwargs={}, out=out))
    results: list[Any] = []
    peak = peak_extra_bytes(lambda: results.append(func(*args)))
    made = sum(
        t.untyped_storage().nbytes() for t in tree_leaves(results) if isinstance(t, torch.Tensor)
    )
    assert probe.notes == ()
    assert found >= peak - made


def test_targets_of_a_ctc_gradient_fit_into_what_forward_kept() -> None:
    """Targets that are padded beyond the longest would be written past the end of its memory."""
    scores, targets = torch.rand(8, 4, 16).log_softmax(-1), torch.ones(4, 9, dtype=torch.long)
    lengths = torch.full((4,), 8), torch.full((4,), 3)
    loss, alpha = aten._ctc_loss.Tensor(scores, targets, *lengths)
    args = (loss, scores, targets, *lengths, loss, alpha, 0)
    assert fills_of(aten._ctc_loss_backward.Tensor, args, {})[id(lengths[1])] == 3
