"""Targets that a loss brings along, at another batch size."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F

from graph_capture.calls.call_spec import TensorSpec
from planner.sizing.resized_loss import resized_loss


def ten_rows(spec: TensorSpec) -> TensorSpec:
    """Four rows become ten."""
    if spec.shape[:1] != (4,):
        return spec
    return replace(spec, shape=(10, *spec.shape[1:]))


def test_a_closure_follows():
    """The twin takes ten rows, the original still takes four."""
    labels = torch.zeros(4, dtype=torch.long)

    def loss_fn(logits):
        return F.cross_entropy(logits, labels)

    twin = resized_loss(loss_fn, ten_rows)
    assert twin is not loss_fn
    assert loss_fn(torch.zeros(4, 3)).isfinite()
    labels_of_twin = twin.__closure__[0].cell_contents
    assert labels_of_twin.shape == (10,)
    assert labels_of_twin.dtype == torch.long


def test_defaults_and_partials_follow():
    """So do the other two ways to bind a tensor to a function."""
    labels = torch.zeros(4)

    def loss_fn(y, target=labels):
        return (y - target).sum()

    assert resized_loss(loss_fn, ten_rows)(torch.zeros(10)).shape == ()
    bound = functools.partial(lambda target, y: (y - target).sum(), labels)
    assert resized_loss(bound, ten_rows)(torch.zeros(10)).shape == ()


def test_a_loss_without_targets_is_left_alone():
    """Functions whose tensors keep their size, modules and None come back as they are."""
    weights = torch.ones(3)

    def loss_fn(y):
        return (y * weights).sum()

    for given in (loss_fn, torch.sum, torch.nn.MSELoss(), None):
        assert resized_loss(given, ten_rows) is given
