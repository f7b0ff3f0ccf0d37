"""Which dimensions of a sample follow the batch and the sequence."""

from __future__ import annotations

import pytest
import torch

from graph_capture.calls.call_spec import TensorSpec, describe
from planner.sizing.samples import ResizableSample

B, L = 3, 5


def resized(arguments, batch=None, sequence=None, **dims):
    """Shapes by name after resizing."""
    sample = ResizableSample(arguments=describe(arguments), **dims)
    return {
        name: spec.shape if isinstance(spec, TensorSpec) else spec
        for name, spec in sample.resized(batch, sequence).items()
    }


def tokens(*shape: int) -> torch.Tensor:
    """Integers of a shape."""
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (tokens(B), (7,)),  # a label for each row
        (tokens(B, L), (7, 11)),  # token types
        (tokens(L), (11,)),  # positions
        (tokens(1, L), (1, 11)),  # positions for all rows
        (tokens(B, 1, 1, L), (7, 1, 1, 11)),  # a padding mask
        (tokens(B, 1, L, L).bool(), (7, 1, 11, 11)),  # a causal mask
        (torch.zeros(B, 1, L, L), (7, 1, 11, 11)),  # one that is added
        (torch.zeros(1, 1, L, L), (1, 1, 11, 11)),
        (torch.zeros(L, L), (11, 11)),
        (torch.zeros(B, L, L), (7, 11, L)),  # L features at L places
        (torch.zeros(B, L, 8), (7, 11, 8)),
        (torch.zeros(B, 4, L, L), (7, 4, L, L)),  # an image of L times L pixels
        (tokens(B, L - 2), (7, L - 2)),  # shorter labels
        (torch.zeros(()), ()),
        (0.5, 0.5),
    ],
)
def test_what_follows_batch_and_sequence(other, expected):
    """The rule of the module, shape by shape, beside (batch, sequence) tokens."""
    shapes = resized({"tokens": tokens(B, L), "other": other}, batch=7, sequence=11)
    assert shapes == {"tokens": (7, 11), "other": expected}


def test_without_a_sequence_only_the_batch_changes():
    """Images keep their size, though channels lie where a sequence would."""
    arguments = {"pixels": torch.zeros(B, 3, L, L), "mask": tokens(B, 1, 3, 3)}
    assert resized(arguments, batch=2) == {"pixels": (2, 3, L, L), "mask": (2, 1, 3, 3)}


def test_nothing_asked_changes_nothing():
    """The specifications are the sample's own, strides of a view included."""
    arguments = {"x": torch.zeros(8, 4)[::2, 1:]}
    sample = ResizableSample(arguments=describe(arguments))
    assert sample.resized(None, None) == describe(arguments)
    assert sample.resized(4, 3) == describe(arguments)


def test_nested_arguments_are_resized():
    """Tensors in lists and dicts follow, too."""
    sample = ResizableSample(arguments=describe({"kwargs": {"a": [tokens(B, 2)]}}))
    assert sample.resized(9)["kwargs"]["a"][0].shape == (9, 2)


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"]
)
def test_the_layout_stays(layout):
    """A resized tensor is dense, in the order in which the sample's dimensions lie in memory."""
    sample = ResizableSample(
        arguments=describe({"x": torch.zeros(B, 3, 6, 4).to(memory_format=layout)})
    )
    expected = torch.empty(10, 3, 6, 4).to(memory_format=layout)
    assert sample.resized(10)["x"].stride == expected.stride()


def test_what_is_expanded_stays_expanded():
    """A mask that takes no memory for its rows takes none for more rows."""
    sample = ResizableSample(arguments=describe({"mask": torch.zeros(1, L).expand(B, L)}))
    assert sample.resized(10)["mask"].stride == (0, 1)


def test_other_dimensions():
    """Time first, batch second, as recurrent models have it."""
    shapes = resized({"x": torch.zeros(L, B, 8)}, batch=7, sequence=11, batch_dim=1, sequence_dim=0)
    assert shapes == {"x": (11, 7, 8)}


def test_the_sample_says_its_size():
    """By the first tensor that has the dimension, in the order of the signature."""
    sample = ResizableSample(arguments=describe({"scale": torch.zeros(()), "x": tokens(B, L)}))
    assert (sample.batch, sample.sequence) == (B, L)


def test_no_such_dimension():
    """The message has the shapes and both ways out."""
    sample = ResizableSample(arguments=describe({"x": torch.zeros(B)}))
    with pytest.raises(ValueError, match=r"dimension 1 for the sequence \(shapes: \[3\]\).*make_s"):
        sample.resized(2, 4)


@pytest.mark.parametrize("dims", [{"batch_dim": -1}, {"sequence_dim": True}, {"batch_dim": 1}])
def test_dimensions_that_make_no_sense(dims):
    """Negative ones, what is no number, and one dimension for both are refused."""
    with pytest.raises(ValueError, match=r"counted from the front|both"):
        ResizableSample(arguments={}, **dims)
