"""What ``fully_shard`` takes on the fullest rank, against figures by hand."""

from __future__ import annotations

import pytest
import torch

from graph_capture.loop.fully_sharded import FullySharded, GroupBytes
from graph_capture.loop.loop_holds import LoopHolds


def test_words_are_read_and_written():
    """All options, in any order and with blanks; defaults are left out."""
    word = "fsdp2:ranks=8,reshard_after_forward=4,reshard_root,no_sync,stored=float32"
    options = FullySharded.of(word)
    assert options == FullySharded(
        ranks=8, reshard_after_forward=4, reshard_root=True, no_sync=True, stored="float32"
    )
    assert str(options) == word
    assert str(FullySharded.of("fsdp2: ranks=2, reshard_after_forward=True")) == "fsdp2:ranks=2"
    assert FullySharded.of("fsdp2:ranks=2,reshard_after_forward=false").reshard_after_forward is (
        False
    )


def test_a_dtype_that_blocks_run_in_anyway_need_not_be_said():
    """Found on a block it is not, and the two are compared."""
    named = FullySharded.of("fsdp2:ranks=2,stored=float32,reduce_dtype=float32")
    assert named.without_dtype(torch.float32) == FullySharded.of("fsdp2:ranks=2")
    assert named.without_dtype(torch.bfloat16) == named


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fsdp2", "fully_shard is 'fsdp2:ranks=2'"),
        ("fsdp:ranks=2", "fully_shard is 'fsdp2:ranks=2'"),
        ("fsdp2:ranks=2,ranks=4", "fully_shard is 'fsdp2:ranks=2'"),
        ("fsdp2:ranks=2,prefetch=2", "fully_shard is 'fsdp2:ranks=2'"),
        ("fsdp2:ranks=1", "two ranks or more, got ranks=1"),
        ("fsdp2:ranks=two", "two ranks or more, got ranks='two'"),
        ("fsdp2:ranks=4,reshard_after_forward=3", "a divisor of ranks=4"),
        ("fsdp2:ranks=4,reshard_after_forward=maybe", "a divisor of ranks=4"),
        ("fsdp2:ranks=2,no_sync=1", "no_sync takes no value"),
        ("fsdp2:ranks=2,stored=int32", "stored is a dtype such as float32"),
        ("fsdp2:ranks=2,stored=floaty", "not a dtype: 'floaty'"),
    ],
)
def test_other_words_are_refused_with_the_reason(word, message):
    """The message says what is wrong and what it may be."""
    with pytest.raises(ValueError, match=message):
        FullySharded.of(word)


def test_what_the_loop_holds_takes_the_word():
    """It is written to files under the same name as DistributedDataParallel's."""
    holds = LoopHolds.of("held", "accumulated", 0, distributed="fsdp2:ranks=2,no_sync")
    assert holds.sharded == FullySharded(ranks=2, no_sync=True)
    assert holds.distributed is None
    assert holds.to_json()["distributed"] == "fsdp2:ranks=2,no_sync"
    assert LoopHolds.from_json(holds.to_json()) == holds
    assert "one rank's part of fsdp2:ranks=2,no_sync" in holds.words
    with pytest.raises(ValueError, match="plan with grads='accumulated'"):
        LoopHolds.of("held", "none", 0, distributed="fsdp2:ranks=2,no_sync")
    with pytest.raises(ValueError, match="grads='consumed' do not go together"):
        LoopHolds.of("held", "consumed", 0, distributed="fsdp2:ranks=2")


def test_a_shard_is_the_first_rank_s_with_padding():
    """Five rows of seven among two ranks: three rows; among eight: one."""
    p = torch.empty(5, 7)
    assert FullySharded(ranks=2).shard_of(p).shape == (3, 7)
    assert FullySharded(ranks=8).shard_of(p).shape == (1, 7)
    assert FullySharded(ranks=2).shard_bytes(p) == 3 * 7 * 4
    half = FullySharded(ranks=2, stored="float32")
    assert half.shard_of(p.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="without dimensions"):
        FullySharded(ranks=2).shard_of(torch.empty(()))


def test_a_group_s_bytes_on_the_cpu():
    """Parameters of 5 x 7 and 4 among two ranks: 6 x 7 + 4 elements with padding."""
    parameters = [torch.empty(5, 7), torch.empty(4)]
    found = GroupBytes.of(FullySharded(ranks=2), parameters, parameters, "cpu")
    whole = (6 * 7 + 4) * 4
    assert found == GroupBytes(
        buffer=whole,
        gathered=whole,
        gathering=whole,  # gloo's copy
        kept=0,
        reduced=whole,
        result=whole // 2,
        gradients=whole // 2,
        reducing=whole + 8 + 4,  # gloo's copy, and its divisor
        unsharded=(5 * 7 + 4) * 4,
    )


def test_a_group_s_bytes_under_a_mixed_precision_policy_on_cuda():
    """Stored in float32, gathered in bfloat16, reduced in float32; blocks of 512 bytes."""
    options = FullySharded(
        ranks=4, reshard_after_forward=2, stored="float32", reduce_dtype="float32"
    )
    parameters = [torch.empty(1022, 3, dtype=torch.bfloat16), torch.empty(4, dtype=torch.bfloat16)]
    found = GroupBytes.of(options, parameters, parameters[:1], "cuda")
    assert found == GroupBytes(
        buffer=6_656,  # 1024 x 3 and 4 elements of 2 bytes: 6,152
        gathered=6_144 + 512,
        gathering=2_048,  # the shards in bfloat16: 1,538
        kept=3_072 + 512,
        reduced=12_288,  # of the one gradient
        result=3_072,
        gradients=3_072,
        reducing=0,
        unsharded=12_288,  # 1022 x 3 of 4 bytes: 12,264
    )
