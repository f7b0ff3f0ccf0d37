"""Segments of blocks run under one checkpoint, in models that call their blocks themselves."""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint_sequential

from benchmarks.testing.zoo import ZOO
from planner import measure
from planner.base.training_step import train_step
from planner.comparing.execution.run_peer import run_peer
from planner.comparing.peers import PEERS
from planner.comparing.peers import segments as peer_segments
from planner.comparing.peers.segments import (
    Call,
    Promised,
    divide,
    record_calls,
)
from tests.planner.comparing.peers.peer_models import (
    Between,
    Peeking,
    Stack,
    made,
)
from tests.planner.comparing.peers.test_peers import (
    BLOCKS,
    prepared,
)

SQRT = PEERS["checkpoint_sqrt"]


@pytest.mark.parametrize("num_blocks", range(1, 40))
def test_one_chain_is_cut_as_checkpoint_sequential_cuts_it(num_blocks: int) -> None:
    """As many segments as asked for, all but the last of equal size, none empty."""
    for num_segments in range(1, num_blocks + 1):
        size = num_blocks // num_segments
        segments = divide([num_blocks], num_segments)
        assert [s.start for s in segments] == [i * size for i in range(num_segments)]
        assert segments[-1].stop == num_blocks


def test_segments_end_where_a_chain_ends() -> None:
    """None crosses the border between two stacks, and each block is in one."""
    segments = divide([5, 2, 9], 4)
    assert [i for s in segments for i in s] == list(range(16))
    assert all(not (s.start < border < s.stop) for s in segments for border in (5, 7))


def test_a_segment_peaks_as_one_written_by_hand() -> None:
    """The peak is that of the loop rewritten with ``checkpoint_sequential``, but for the masks."""

    class ByHand(Stack):
        def forward(self, x):
            scale = x.mean(dim=-1, keepdim=True)
            x = self.embed(x)
            run = [lambda h, layer=layer: layer(h, scale) for layer in self.layers]
            x = checkpoint_sequential(run, 3, x, use_reentrant=False)
            return self.head(x).square().mean()

    model, sample = made(Stack)
    sample = sample.repeat(64, 1)
    by_hand = copy.deepcopy(model)
    by_hand.__class__ = ByHand
    with prepared("checkpoint_sqrt", model, sample) as ready:
        peak_bytes = measure(ready.model, sample, repeats=0).peak_bytes
        assert ready.setting == "segments=3"
    expected = measure(by_hand, sample, repeats=0).peak_bytes
    assert peak_bytes == pytest.approx(expected, rel=0.02)
    assert expected < measure(model, sample, repeats=0).peak_bytes


@pytest.mark.slow
def test_both_stacks_of_t5_are_cut() -> None:
    """Position biases that one block makes and the others read are handed on."""
    case = ZOO["t5"]("tiny")
    model = case.make()
    config = copy.deepcopy(model.config)
    config.num_layers = config.num_decoder_layers = 4
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        deep = type(model)(config).train()
    row = run_peer(SQRT, deep, case.sample(0), repeats=0, num_seeds=1)
    assert row.measured is not None, row.error
    assert row.measured.bits == "equal", row.measured.difference
    assert row.setting == "segments=4"
    assert "2 stretches" in row.note


def test_blocks_with_code_between_them_are_refused() -> None:
    """The row names the first place."""
    model, sample = made(Between, num_layers=9)
    row = run_peer(SQRT, model, sample, blocks=BLOCKS)
    assert "8 places (the first: layers.0 and layers.1)" in row.error


def test_a_block_that_is_called_again_is_refused() -> None:
    """There is no order of blocks to cut."""
    model, sample = made(Stack)
    model.layers[4] = model.layers[0]
    row = run_peer(SQRT, model, sample, blocks=tuple(b for b in BLOCKS if b != "layers.4"))
    assert "layers.0 is called more than once" in row.error


def test_a_model_that_looks_between_blocks_gets_an_error() -> None:
    """No stale or made-up value is ever read."""
    model, sample = made(Peeking)
    with prepared("checkpoint_sqrt", model, sample) as ready:
        train_step(ready.model, sample)
        ready.model.peek = True
        with pytest.raises(RuntimeError, match=r"mean reads a value between two blocks"):
            train_step(ready.model, sample)


def test_other_arguments_than_noted_are_an_error() -> None:
    """A block that is given another tensor would not compute what the segment has computed."""
    model, sample = made(Stack)
    with prepared("checkpoint_sqrt", model, sample) as ready:
        second = ready.model.layers[1]
        inner = second.forward
        second.forward = lambda x, scale, **options: inner(x, scale + 0, **options)
        with pytest.raises(RuntimeError, match=r"argument 1 of block layers\.1 differs"):
            train_step(ready.model, sample)


def test_what_was_noted_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """No activation of the run that notes the calls is alive while the peer is measured."""
    seen: list[weakref.ref[Tensor]] = []

    def noting(*args: Any) -> list[Call]:
        calls = record_calls(*args)
        seen.extend(weakref.ref(output) for call in calls for output in call.outputs)
        return calls

    monkeypatch.setattr(peer_segments, "record_calls", noting)
    with prepared("checkpoint_sqrt", *made(Stack)):
        assert len(seen) == 9
        assert not any(ref() is not None for ref in seen)


def test_a_promise_answers_what_needs_no_value() -> None:
    """Shape, dtype and device, in the memory of one element."""
    promise = Promised.of(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert (promise.shape, promise.dtype, promise.device.type) == ((3, 5), torch.bfloat16, "cpu")
    assert promise.size(1) == 5
    # It was seen without gradients, and in a step the value has one.
    with pytest.raises(RuntimeError, match=r"^requires_grad reads a value between two blocks"):
        _ = promise.requires_grad
    with contextlib.suppress(RuntimeError):
        promise + 1
        pytest.fail("a value was read that is not there")
