"""A step as one rank of ``fully_shard`` runs it, moment by moment, against figures by hand."""

from __future__ import annotations

import pytest

from graph_capture.cost_graph import CostGraph, Operator, Storage
from graph_capture.loop.fully_sharded import FullySharded, GroupBytes
from planner.blocks.sharded_step import Group, sharded_step
from solvers.block_plans.stepping import Block, BlockCall, BlockedStep
from solvers.replay import replay
from solvers.schedule import Schedule

ROOT = GroupBytes(
    buffer=100,
    gathered=100,
    gathering=7,
    kept=10,
    reduced=100,
    result=50,
    gradients=50,
    reducing=9,
    unsharded=90,
)
BLOCK = GroupBytes(
    buffer=1_000,
    gathered=1_000,
    gathering=70,
    kept=250,
    reduced=1_000,
    result=500,
    gradients=500,
    reducing=90,
    unsharded=900,
)
OUT, SAVED, WHOLE = 20, 3, 900
"""Bytes of a block's output, of what it saves, and of its parameters' gradient."""


def _block() -> Block:
    """Reads a parameter and an input; saves something; makes the gradients of both."""
    return Block(
        graph=CostGraph(
            (
                Operator(name="f", inputs=(0, 1), outputs=(2, 3)),
                Operator(name="turn", inputs=(2,), outputs=(4,), phase="loss"),
                Operator(name="b", inputs=(0, 3, 4), outputs=(5, 6), phase="backward"),
            ),
            (
                Storage(name="p", size_bytes=WHOLE, producer=None, category="parameter"),
                Storage(name="x", size_bytes=OUT, producer=None, category="input"),
                Storage(name="y", size_bytes=OUT, producer=0, category="output", kept=True),
                Storage(name="saved", size_bytes=SAVED, producer=0),
                Storage(name="dy", size_bytes=OUT, producer=1, category="temporary"),
                Storage(name="dp", size_bytes=WHOLE, producer=2, category="gradient", kept=True),
                Storage(name="dx", size_bytes=OUT, producer=2, category="gradient", kept=True),
            ),
        ),
        turn=1,
    )


def _step() -> BlockedStep:
    """An embedding, two calls of the block, a loss, and the embedding's gradient."""
    storages = (
        Storage(name="e", size_bytes=90, producer=None, category="parameter"),
        Storage(name="p0", size_bytes=WHOLE, producer=None, category="parameter"),
        Storage(name="p1", size_bytes=WHOLE, producer=None, category="parameter"),
        Storage(name="x0", size_bytes=OUT, producer=0),
        Storage(name="x1", size_bytes=OUT, producer=1),
        Storage(name="x2", size_bytes=OUT, producer=2),
        Storage(name="dx2", size_bytes=OUT, producer=3, category="temporary"),
        Storage(name="dp1", size_bytes=WHOLE, producer=4, category="gradient", kept=True),
        Storage(name="dx1", size_bytes=OUT, producer=4, category="temporary"),
        Storage(name="dp0", size_bytes=WHOLE, producer=5, category="gradient", kept=True),
        Storage(name="dx0", size_bytes=OUT, producer=5, category="temporary"),
        Storage(name="de", size_bytes=90, producer=6, category="gradient", kept=True),
    )
    operators = (
        Operator(name="embed", inputs=(0,), outputs=(3,)),
        Operator(name="forward 0", inputs=(1, 3), outputs=(4,)),
        Operator(name="forward 1", inputs=(2, 4), outputs=(5,)),
        Operator(name="loss", inputs=(5,), outputs=(6,), phase="loss"),
        Operator(name="backward 1", inputs=(2, 6), outputs=(7, 8), phase="backward"),
        Operator(name="backward 0", inputs=(1, 8), outputs=(9, 10), phase="backward"),
        Operator(name="embed backward", inputs=(10,), outputs=(11,), phase="backward"),
        Operator(name="optimizer", inputs=(7, 9, 11), phase="optimizer"),
    )
    calls = tuple(
        BlockCall(path=f"layers.{i}", block=0, forward=f, backward=b, outside=outside)
        for i, (f, b, outside) in enumerate(
            (
                (1, 5, {0: 1, 1: 3, 2: 4, 4: 8, 5: 9, 6: 10}),
                (2, 4, {0: 2, 1: 4, 2: 5, 4: 6, 5: 7, 6: 8}),
            )
        )
    )
    return BlockedStep(CostGraph(operators, storages), (_block(),), calls)


def _groups() -> list[Group]:
    return [
        Group(path="", call=None, parameters={0: 45}, gradients=(11,), num_bytes=ROOT),
        Group(path="layers.0", call=0, parameters={1: 450}, gradients=(9,), num_bytes=BLOCK),
        Group(path="layers.1", call=1, parameters={2: 450}, gradients=(7,), num_bytes=BLOCK),
    ]


def _moments(options: FullySharded, *, accumulates: bool = False) -> list[tuple[str, int]]:
    """The operators of the whole step, and what is in memory at each beside the shards."""
    step = sharded_step(_step(), _groups(), options, accumulates=accumulates)
    schedule = step.schedule({call.path: Schedule((0, 1, 2)) for call in step.calls})
    outcome = replay(step.whole, schedule)
    there = 45 + 450 + 450
    names = [step.whole.operators[v].name for v in schedule.order]
    short = [name.removeprefix("fsdp2/").rpartition("_")[0] or name for name in names]
    return [
        (label if name.startswith("fsdp2/") else name, memory - there)
        for name, label, memory in zip(names, short, outcome.memory_bytes, strict=True)
    ]


FORWARD_BYTES = [
    ("root/all_gather", 107),
    ("root/copy_out", 200),
    ("embed", 200 + OUT),
    ("layers.0/all_gather", 200 + OUT + 1_070),  # the root's buffer is there until here
    ("layers.0/copy_out", 100 + OUT + 2_000),
    ("layers.0/f", 100 + OUT + 2_000 + OUT + SAVED),
]


def test_a_group_is_gathered_for_forward_and_gone_after_it():
    """Its buffer stays until the next one is filled, and the root's parameters until the end."""
    found = _moments(FullySharded(ranks=2))
    assert found[:11] == [
        *FORWARD_BYTES,
        ("layers.0/reshard_after_forward", 100 + 2_000 + OUT + SAVED),
        ("layers.1/all_gather", 100 + 2_070 + OUT + SAVED),
        ("layers.1/copy_out", 100 + 2_000 + OUT + SAVED),
        ("layers.1/f", 100 + 2_000 + 2 * (OUT + SAVED)),
        ("layers.1/reshard_after_forward", 100 + 2_000 + OUT + 2 * SAVED),
    ]


def test_the_group_before_is_gathered_ahead_in_backward():
    """While a block's gradients are computed and reduced, the next one's buffer is there."""
    found = _moments(FullySharded(ranks=2))
    at = next(i for i, (name, _) in enumerate(found) if name == "root/forward_ends")
    assert found[at:] == [
        ("root/forward_ends", 100 + 1_000 + OUT + 2 * SAVED),
        ("loss", 100 + 2 * OUT + 2 * SAVED),
        ("layers.1/all_gather", 100 + 1_070 + OUT + 2 * SAVED),
        ("layers.1/copy_out", 100 + 2_000 + OUT + 2 * SAVED),
        ("layers.0/all_gather", 100 + 2_070 + OUT + 2 * SAVED),
        ("layers.1/b", 100 + 2_000 + 2 * OUT + 2 * SAVED + WHOLE),
        ("layers.1/reshard_after_backward", 100 + 2_000 + OUT + SAVED + WHOLE),
        ("layers.1/copy_gradients", 100 + 1_000 + OUT + SAVED + WHOLE + 1_000),
        ("layers.1/reduce_scatter", 100 + 1_000 + OUT + SAVED + 1_000 + 500 + 90),
        ("layers.0/copy_out", 100 + 2_000 + OUT + SAVED + 1_500),
        ("layers.0/b", 100 + 1_000 + 2 * OUT + SAVED + 1_500 + WHOLE),
        ("layers.0/reshard_after_backward", 100 + 1_000 + OUT + 1_500 + WHOLE),
        ("layers.0/copy_gradients", 100 + OUT + 500 + WHOLE + 1_000),
        ("layers.0/reduce_scatter", 100 + OUT + 500 + 1_000 + 500 + 90),
        ("embed backward", 100 + OUT + 2_000 + 90),
        ("root/reshard_after_backward", 100 + 2_000 + 90),
        ("root/copy_gradients", 1_000 + 90 + 100),
        ("root/reduce_scatter", 1_000 + 100 + 50 + 9),
        ("root/backward_ends", 1_000 + 100 + 50),
        ("optimizer", 1_050),
    ]


def test_what_is_not_resharded_is_gathered_once():
    """Parameters stay until their block's gradients are there."""
    found = dict(_moments(FullySharded(ranks=2, reshard_after_forward=False)))
    assert not any(name.endswith("reshard_after_forward") for name in found)
    assert found["layers.1/f"] == 100 + 1_000 + 2_000 + 2 * (OUT + SAVED)
    assert found["loss"] == 100 + 2_000 + 2 * OUT + 2 * SAVED
    assert found["layers.1/b"] == 100 + 2_000 + 2 * OUT + 2 * SAVED + WHOLE


def test_a_smaller_group_s_shards_stay_from_forward_to_backward():
    """As many bytes as its parameters among so many ranks, beside them while they are cut."""
    found = _moments(FullySharded(ranks=8, reshard_after_forward=4))
    of = dict(found)
    assert of["layers.0/keep_after_forward"] == 100 + 2_000 + OUT + SAVED + 250
    assert of["loss"] == 100 + 500 + 2 * OUT + 2 * SAVED
    assert of["layers.1/b"] == 100 + 2_000 + 250 + 2 * OUT + 2 * SAVED + WHOLE
    assert of["layers.0/b"] == 100 + 1_000 + 2 * OUT + SAVED + 1_500 + WHOLE


def test_a_root_that_is_resharded_is_gathered_again():
    """Before the backward pass, with the last block's buffer after it."""
    found = _moments(FullySharded(ranks=2, reshard_root=True))
    names = [name for name, _ in found]
    at = names.index("loss")
    assert dict(found)["loss"] == 2 * OUT + 2 * SAVED
    assert found[at + 1 : at + 4] == [
        ("root/all_gather", 107 + OUT + 2 * SAVED),
        ("root/copy_out", 200 + OUT + 2 * SAVED),
        ("layers.1/all_gather", 100 + 1_070 + OUT + 2 * SAVED),
    ]


@pytest.mark.parametrize(
    ("options", "earlier", "kept"),
    [(FullySharded(ranks=2), 1_050, 0), (FullySharded(ranks=2, no_sync=True), 1_890, 1_050)],
    ids=["reduced", "unsharded"],
)
def test_earlier_gradients_lie_there_all_the_time(options, earlier, kept):
    """Sharded ones take up the new sums; unsharded ones are as large as the parameters."""
    found = _moments(options, accumulates=True)
    assert found[0] == ("root/all_gather", 107 + earlier)
    assert found[-1] == ("optimizer", earlier + kept)


def test_what_gets_no_gradient_through_its_call_is_reduced_at_the_end():
    """A block behind a frozen embedding: its gradients wait, and so do its parameters."""
    root, first, second = _groups()
    late = Group(
        path=first.path,
        call=first.call,
        parameters=first.parameters,
        gradients=first.gradients,
        num_bytes=first.num_bytes,
        at_end=True,
    )
    step = sharded_step(_step(), [root, late, second], FullySharded(ranks=2), accumulates=False)
    names = [op.name for op in step.whole.operators]
    places = [
        next(i for i, name in enumerate(names) if name.startswith(start))
        for start in (
            "embed backward",
            "fsdp2/root/reduce_scatter",
            "fsdp2/layers.0/reduce_scatter",
            "optimizer",
        )
    ]
    assert places == sorted(places)
