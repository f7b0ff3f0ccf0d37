"""Block plans under FSDP2: bits of loss and sharded gradients, and each rank's peak."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from graph_capture.loop.loop_holds import NOTHING_ELSE
from planner import BlockPlan, PlanWarning, applied_blocks, check_same_plan, measure
from planner.blocks.looking_at_loop import LookAtLoop
from planner.errors import PlanError, PlanMismatchError
from tests.ranks import spawn_ranks

from .small_blocks import ROWS, batch, deep, deep_plan

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

TINY_BYTES = 144
"""What eager takes for a moment, and the optimizer's state of a rank with shorter shards."""
NUM_RECORDS = 8
"""Gloo's threads at times free a buffer, which the recorder does not hear of: the least counts."""


def _sharded(
    model: nn.Module,
    *,
    reshard: bool | int = True,
    root: bool | None = None,
    with_root: bool = True,
    **options: Any,
) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_submodule("layers").children():
        fully_shard(layer, reshard_after_forward=reshard, **options)
    if with_root:
        fully_shard(model, reshard_after_forward=root, **options)
    return model


def _sharded_together(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(list(model.get_submodule("layers").children()))
    fully_shard(model)
    return model


def _train(model: nn.Module, call: Any = None, *, micro_batches: int = 1) -> list[Tensor]:
    """Losses and this rank's parts of the gradients, of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for i in range(micro_batches):
            if micro_batches > 1:
                model.set_requires_gradient_sync(i == micro_batches - 1)
            loss = model(*(batch(ROWS) if call is None else call))
            loss.backward()
        found.append(loss.detach())
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found += [(g.to_local() if hasattr(g, "to_local") else g).clone() for g in grads]
        optimizer.step()
    return found


def _peak(model: nn.Module, call: Any = None) -> int:
    call = batch(ROWS) if call is None else call
    records = [
        measure(model, call, optimizer="adamw", repeats=0).peak_bytes for _ in range(NUM_RECORDS)
    ]
    return min(records)


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def _begin(rank: int, folder: str, world_size: int = 2) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)


def _end(rank: int, folder: str, results: dict[str, Any]) -> None:
    torch.save(results, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "resharded": ("fsdp2:ranks=2", {}),
    "kept": ("fsdp2:ranks=2,reshard_after_forward=False", {"reshard": False}),
    "root resharded": ("fsdp2:ranks=2,reshard_root", {"root": True}),
}


def _work(rank: int, folder: str) -> None:
    _begin(rank, folder)
    warnings.simplefilter("error", PlanWarning)
    results: dict[str, Any] = {}
    for way, (_, options) in WAYS.items():
        plan = BlockPlan.load(f"{folder}/{way}.json")
        eager = _sharded(deep(), **options)
        peaks = [(plan.baseline_peak_bytes, _peak(eager))]
        expected = _train(_sharded(deep(), **options))
        before = _sharded(plan.apply(deep()), **options)
        after = plan.apply(_sharded(deep(), **options))
        check_same_plan(after)
        for when, model in (("before", before), ("after", after)):
            same = _same(_train(model), expected)
            applied = applied_blocks(model)
            assert applied is not None
            results[f"{when}, {way}"] = same, applied.planned_steps
        peaks.append((plan.predicted_peak_bytes, _peak(after)))
        results[f"peaks, {way}"] = peaks
    results |= _mixed(folder) | _accumulated(folder) | _otherwise(rank, folder)
    _end(rank, folder, results)


def _mixed(folder: str) -> dict[str, Any]:
    """Stored in float32, gathered in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    x, target = batch(ROWS)
    call = x.bfloat16(), target
    plan = BlockPlan.load(f"{folder}/mixed.json")
    models = [_sharded(deep(), mp_policy=policy) for _ in range(2)]
    plan.apply(models[1])
    peaks = [
        (predicted, _peak(model, call))
        for model, predicted in zip(
            models, (plan.baseline_peak_bytes, plan.predicted_peak_bytes), strict=True
        )
    ]
    trained = [_train(model, call) for model in models]
    return {"mixed": _same(*trained), "peaks, mixed": peaks}


def _accumulated(folder: str) -> dict[str, Any]:
    """Micro-batches whose gradients are not reduced but for the last."""
    plan = BlockPlan.load(f"{folder}/accumulated.json")
    models = [_sharded(deep()), plan.apply(_sharded(deep()))]
    return {"accumulated": _same(*(_train(model, micro_batches=3) for model in models))}


def _otherwise(rank: int, folder: str) -> dict[str, Any]:
    """Plans for other models, for other sharding, and another in each process."""
    plan, found = BlockPlan.load(f"{folder}/resharded.json"), {}
    other = deep()
    other.layers[0].up = nn.Linear(16, 60)
    with pytest.raises(PlanMismatchError) as caught:
        plan.apply(_sharded(other))
    found["another shape"] = str(caught.value)
    ways: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
        "no word": ("unsharded", _sharded),
        "other word": ("resharded", partial(_sharded, reshard=False)),
        "root": ("resharded", partial(_sharded, root=True)),
        "together": ("resharded", _sharded_together),
        "without root": ("resharded", partial(_sharded, reshard=True, with_root=False)),
    }
    for name, (file, shard) in ways.items():
        model = BlockPlan.load(f"{folder}/{file}.json").apply(shard(deep()))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", PlanWarning)
            _train(model)
        found[name] = [str(w.message) for w in said if w.category is PlanWarning]
    found |= _uncounted(plan)
    model = plan.apply(_sharded(deep()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PlanWarning)
        for _ in range(3):
            model(*batch(ROWS)).backward()
    found["gradients held"] = [str(w.message) for w in said if w.category is PlanWarning]
    mine = BlockPlan.load(f"{folder}/{('resharded', 'another')[rank]}.json")
    for when, model in (("sharded", _sharded(deep())), ("not yet", deep())):
        with pytest.raises(PlanMismatchError) as caught:
            mine.apply(model)
        found[f"another plan, {when}"] = str(caught.value), applied_blocks(model)
    short = deep()
    if rank == 1:
        del short.layers[5]
    began = time.monotonic()
    with pytest.raises(PlanError) as without:
        plan.apply(_sharded(short))
    found["a block is missing"] = (
        str(without.value),
        applied_blocks(short),
        time.monotonic() - began,
    )
    return found


def _uncounted(plan: BlockPlan) -> dict[str, list[str]]:
    """What is said of options that no word counts, and of what is not ``fully_shard``."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.nn.parallel import DistributedDataParallel

    offloaded = _sharded(deep(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    ahead = _sharded(deep())
    ahead.layers[0].set_modules_to_forward_prefetch([ahead.layers[1], ahead.layers[2]])
    found = {}
    for name, model in (("offload", offloaded), ("ahead", ahead)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", PlanWarning)
            LookAtLoop.of(plan, model)(model.layers[0], again=False)
        found[name] = [str(w.message) for w in said]
    tight = replace(plan, budget_bytes=plan.predicted_peak_bytes, holds=NOTHING_ELSE)
    wrapper = DistributedDataParallel(deep())
    with pytest.raises(PlanMismatchError, match=r"apply it to the module inside, wrapper\.module"):
        tight.apply(wrapper)
    tight.apply(wrapper.module)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PlanWarning)
        wrapper(*batch(ROWS)).backward()
    found["wrapped"] = [str(w.message) for w in said if "buckets" in str(w.message)]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has seen."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    words = {way: word for way, (word, _) in WAYS.items()}
    for way, word in words.items():
        deep_plan(word).save(folder / f"{way}.json")
    mixed = "fsdp2:ranks=2,stored=float32,reduce_dtype=float32"
    deep_plan(mixed, dtype=torch.bfloat16).save(folder / "mixed.json")
    deep_plan("fsdp2:ranks=2,no_sync").save(folder / "accumulated.json")
    deep_plan(words["resharded"], "85%").save(folder / "another.json")
    deep_plan(None).save(folder / "unsharded.json")
    spawn_ranks(_work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_bits_are_those_of_fsdp_without_a_plan(
    found: list[dict[str, Any]], when: str, way: str
) -> None:
    """Applied before and after sharding, on both ranks, in two planned steps."""
    assert [rank[f"{when}, {way}"] for rank in found] == [(True, 2), (True, 2)]


@pytest.mark.parametrize("way", [*WAYS, "mixed"])
@pytest.mark.parametrize("planned", [False, True], ids=["eager", "planned"])
def test_each_rank_s_peak_is_as_predicted(
    found: list[dict[str, Any]], way: str, planned: bool
) -> None:
    """Shards, gathered parameters, buffers of collectives and the optimizer's state included."""
    for rank in found:
        predicted, recorded = rank[f"peaks, {way}"][planned]
        assert predicted - 2 * TINY_BYTES <= recorded <= predicted + TINY_BYTES * (not planned)


@pytest.mark.parametrize("way", ["mixed", "accumulated"])
def test_other_loops_have_the_same_bits(found: list[dict[str, Any]], way: str) -> None:
    """A mixed-precision policy, and gradients of micro-batches that are reduced at the end."""
    assert all(rank[way] for rank in found)


def test_a_sharded_block_of_another_shape_is_refused_when_applied(
    found: list[dict[str, Any]],
) -> None:
    """By the whole shape of its parameter, on both ranks."""
    assert all("layers.0" in rank["another shape"] for rank in found)
    assert all("has shape (60, 16), planned was (64, 16)" in r["another shape"] for r in found)


def test_sharding_that_a_plan_does_not_count_is_said_once(found: list[dict[str, Any]]) -> None:
    """A plan of the step on one process, and one for other options, name the word to plan with."""
    for rank in found:
        (unsharded,), (other,) = rank["no word"], rank["other word"]
        assert "is sharded as fsdp2:ranks=2, and its plan counts that it is not" in unsharded
        assert "plan with distributed='fsdp2:ranks=2'" in unsharded
        assert "as fsdp2:ranks=2,reshard_after_forward=False, and its plan counts fsdp2:r" in other


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("root", "sharded as fsdp2:ranks=2,reshard_root, and its plan counts fsdp2:ranks=2:"),
        ("together", "call fully_shard once for each planned block"),
        ("without root", "call fully_shard on the model, too, after its blocks"),
    ],
)
def test_sharding_of_the_rest_is_seen_from_a_block(
    found: list[dict[str, Any]], way: str, words: str
) -> None:
    """A root resharded otherwise or not sharded, and blocks that are gathered together."""
    for rank in found:
        (said,) = rank[way]
        assert words in said


def test_sharded_gradients_that_are_not_counted_are_said_once(
    found: list[dict[str, Any]],
) -> None:
    """Where the budget has no room for them."""
    for rank in found:
        (said,) = rank["gradients held"]
        assert "26.4 kB of gradients are there when a planned step begins" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("offload", "sharded with CPUOffloadPolicy, which keeps shards, gradients"),
        ("ahead", "with set_modules_to_forward_prefetch, which gather more blocks ahead of"),
        ("wrapped", "52.8 kB of gradients lie in the buckets of a DistributedDataParallel"),
    ],
)
def test_what_no_word_counts_is_said(found: list[dict[str, Any]], name: str, words: str) -> None:
    """Once, with what to do instead."""
    for rank in found:
        (said,) = rank[name]
        assert words in said


@pytest.mark.parametrize("when", ["sharded", "not yet"])
def test_a_rank_with_another_plan_is_an_error_on_both(
    found: list[dict[str, Any]], when: str
) -> None:
    """Before the first step, and nothing is applied."""
    for rank in found:
        message, applied = rank[f"another plan, {when}"]
        assert "ranks 0 and 1 have" in message
        assert applied is None


def test_a_block_that_one_rank_lacks_is_an_error_on_both(found: list[dict[str, Any]]) -> None:
    """At once; the message names the rank and the block, and nothing is applied."""
    (other, *of_other), (own, *of_own) = (rank["a block is missing"] for rank in found)
    assert "has no block 'layers.5', which the plan is for" in own
    assert "rank 1 could not apply the plan, so that no process does: PlanMismatchE" in other
    assert own in other
    for applied, seconds in (of_other, of_own):
        assert applied is None
        assert seconds < 20


# -- four ranks --------------------------------------------------------------------------

UNEVEN = 18
"""A width that four ranks do not divide."""


def _replicas(plan: BlockPlan) -> tuple[bool, int]:
    """Bits and peak with two replicas of two shards each, on a mesh of two dimensions."""
    from torch.distributed.device_mesh import init_device_mesh

    make = partial(_sharded, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))
    model = plan.apply(make(deep(UNEVEN)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)
        return _same(_train(model), _train(make(deep(UNEVEN)))), _peak(model)


def _four(rank: int, folder: str) -> None:
    _begin(rank, folder, world_size=4)
    plan = BlockPlan.load(f"{folder}/plan.json")
    make = partial(_sharded, reshard=2)
    expected = _train(make(deep(UNEVEN)))
    model = plan.apply(make(deep(UNEVEN)))
    same = _same(_train(model), expected)
    two = BlockPlan.load(f"{folder}/two.json").apply(_sharded(deep(UNEVEN)))
    with pytest.warns(PlanWarning, match=r"as fsdp2:ranks=4, and its plan counts fsdp2:ranks=2:"):
        two(*batch(ROWS)).backward()
    replicas = _replicas(BlockPlan.load(f"{folder}/two.json"))
    _end(
        rank,
        folder,
        {
            "replicas": replicas,
            "same": same,
            "peak": _peak(model),
            "eager": _peak(make(deep(UNEVEN))),
        },
    )


def test_four_ranks_with_padded_shards_that_keep_some_among_two(tmp_path: Path) -> None:
    """Bits on each; the first, whose shards are longest, has the predicted peaks.

    A plan for two ranks says that there are four; with two replicas of two shards each it is exact.
    """
    plan = deep_plan("fsdp2:ranks=4,reshard_after_forward=2", width=UNEVEN)
    plan.save(tmp_path / "plan.json")
    two = deep_plan("fsdp2:ranks=2", width=UNEVEN)
    two.save(tmp_path / "two.json")
    spawn_ranks(_four, (str(tmp_path),), nprocs=4)
    for rank in range(4):
        seen = torch.load(tmp_path / str(rank))
        assert seen["same"]
        same, recorded = seen["replicas"]
        assert same
        assert two.predicted_peak_bytes - 2 * TINY_BYTES <= recorded <= two.predicted_peak_bytes
        for predicted, recorded, more in (
            (plan.predicted_peak_bytes, seen["peak"], 0),
            (plan.baseline_peak_bytes, seen["eager"], TINY_BYTES),
        ):
            assert recorded <= predicted + more
            assert recorded >= predicted - TINY_BYTES or rank > 0
