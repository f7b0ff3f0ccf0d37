"""Trainers that a launcher has started in two processes: their own wrappers and collectives."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from planner import PlanWarning
from tests.planner.integrations.loops import Texts, assert_same, language_model, padded
from tests.planner.integrations.test_transformers import remat, run, trainer
from tests.planner.integrations.test_trl import dpo, sft
from tests.ranks import spawn_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

OPTIONS: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4}


def _known_lengths(folder: Path, *callbacks: Any) -> Any:
    """Transformers' Trainer over a data set whose longest rows are planned for."""
    import datasets

    rows = [{k: v.tolist() for k, v in row.items()} for row in Texts(60, many_lengths=True).rows]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return padded([{k: torch.tensor(v) for k, v in row.items()} for row in rows])

    texts = datasets.Dataset.from_list(rows)
    own = {"train_dataset": texts, "data_collator": collate}
    return run(trainer(folder, language_model(), *callbacks, **own, **OPTIONS))


LOOPS = {"known lengths": _known_lengths, "SFT": sft, "DPO": dpo}


def _work(rank: int, folder: str, port: int) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from accelerate.state import AcceleratorState

    from tests.planner.integrations import test_trl

    test_trl.OPTIONS.update(OPTIONS)
    found = {}
    for name, loop in LOOPS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        eager = loop(Path(folder) / "eager")
        AcceleratorState._reset_state(reset_partial_state=True)
        callback = remat(budget="75%" if loop is _known_lengths else "97%")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", PlanWarning)
            planned = loop(Path(folder) / "planned", callback)
        assert_same(eager, planned)
        found[name] = {
            "steps": (callback.applied.planned_steps, callback.applied.unplanned_steps),
            "word": str(callback.plan.holds.distributed),
            "length": callback.plan.guard.arguments["input_ids"].shape[1],
            "buckets": [str(w.message) for w in said if "buckets" in str(w.message)],
        }
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has seen; losses and weights are equal to those without a plan."""
    for package in ("accelerate", "datasets", "trl"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("trainers")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn_ranks(_work, (str(folder), port), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("name", LOOPS)
def test_a_trainer_s_buckets_are_counted(found: list[dict[str, Any]], name: str) -> None:
    """The wrapper is found, and every step goes by the plan, numbers for the log gathered."""
    for rank in found:
        assert rank[name]["steps"] == (3, 0)
        assert rank[name]["word"].startswith("ddp")
        assert not rank[name]["buckets"]


def test_the_longest_rows_are_planned_for_with_the_buckets(found: list[dict[str, Any]]) -> None:
    """Though no wrapper's forward runs when that is done."""
    assert [rank["known lengths"]["length"] for rank in found] == [32, 32]
