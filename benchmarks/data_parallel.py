"""GPT-2 under ``DistributedDataParallel`` in two processes, with a plan and without.

``python -m benchmarks.data_parallel`` trains the same model with both, for each of the wrapper's
options that change memory, on the CPU over gloo. Reported per option: bytes of the buckets, the
peak of each rank as the allocator records it beside the prediction, when in the backward pass
the first all-reduce starts, and whether all gradients have eager's bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from planner import Plan, measure, optimize

NUM_LAYERS, WIDTH, VOCABULARY, BATCH, SEQUENCE = 6, 256, 8_192, 4, 256
WORLD_SIZE, NUM_STEPS, MICRO_BATCHES = 2, 9, 3
UNSTEADY_STEPS = 2
"""At the start: the wrapper orders its buckets after the first one, or a static graph's second."""
BUDGET = "70%"
WAYS: tuple[tuple[dict[str, bool], str], ...] = (
    ({}, "none"),
    ({"gradient_as_bucket_view": True}, "none"),
    ({"find_unused_parameters": True}, "none"),
    ({"static_graph": True}, "none"),  # fails in eager where its first step has no_sync()
    ({}, "accumulated"),
    ({"gradient_as_bucket_view": True}, "accumulated"),
)
"""Options of the wrapper, and what the loop does with gradients."""


def gpt2(seed: int = 0) -> nn.Module:
    """Return the model, the same in every process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=NUM_LAYERS,
        n_embd=WIDTH,
        n_head=4,
        n_positions=SEQUENCE,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).train()


def call(seed: int) -> dict[str, Any]:
    """Return a batch with labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}


def train(
    rank: int, options: dict[str, bool], plan: Plan | None, *, accumulates: bool
) -> tuple[list[torch.Tensor], list[float]]:
    """Return the gradients of the last step, and when the first all-reduce of each started.

    Times are shares of the backward pass.
    """
    wrapper = DistributedDataParallel(gpt2(), **options)
    if plan is not None:
        plan.apply(wrapper)
    started: list[float] = []

    def reduce(_state, bucket):  # type: ignore[no-untyped-def]  # it wants no annotations as text
        started.append(time.perf_counter())
        work = dist.all_reduce(bucket.buffer().div_(WORLD_SIZE), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapper.register_comm_hook(None, reduce)
    shares = []
    for step in range(NUM_STEPS):
        wrapper.zero_grad()
        num_micro = MICRO_BATCHES if accumulates else 1
        for micro in range(num_micro):
            synced = micro == num_micro - 1
            with nullcontext() if synced else wrapper.no_sync():
                torch.manual_seed(100 * step + micro)
                loss = wrapper(**call(1000 * step + 10 * micro + rank)).loss
                started.clear()
                begin = time.perf_counter()
                loss.backward()
                whole = time.perf_counter() - begin
        shares.append((started[0] - begin) / whole)
    return [p.grad.clone() for p in wrapper.parameters()], shares[UNSTEADY_STEPS:]


def work(rank: int, folder: str, time_limit_s: float) -> None:
    """Train in one process and write down what was seen."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD_SIZE)
    rows = []
    for options, grads in WAYS:
        words: dict[str, Any] = {"optimizer": "adamw", "outputs": "released", "grads": grads}
        wrapper = DistributedDataParallel(gpt2(), **options)
        file = Path(folder, f"{len(rows)}.plan")
        if rank == 0:
            optimize(wrapper, call(0), budget=BUDGET, time_limit_s=time_limit_s, **words).save(file)
        dist.barrier()
        plan = Plan.load(file)
        eager = measure(wrapper, call(0), optimizer="adamw", repeats=0, **without(words))
        planned = measure(plan.apply(wrapper), call(0), optimizer="adamw", repeats=0)
        del wrapper
        accumulates = grads == "accumulated"
        (expected, eagers), (found, plans) = (
            train(rank, options, which, accumulates=accumulates) for which in (None, plan)
        )
        rows.append(
            {
                "options": ", ".join(options) or "none",
                "grads": grads,
                "bucket_bytes": plan.memory.by_category["bucket"],
                "eager_predicted": plan.baseline_peak_bytes,
                "eager_measured": eager.peak_bytes,
                "predicted": plan.predicted_peak_bytes,
                "measured": planned.peak_bytes,
                "overhead": plan.overhead,
                "eager_first": statistics.median(eagers),
                "planned_first": statistics.median(plans),
                "bits": all(map(torch.equal, expected, found)),
            }
        )
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def without(words: dict[str, Any]) -> dict[str, Any]:
    """The words of a loop, without the optimizer."""
    return {name: word for name, word in words.items() if name != "optimizer"}


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit-s", type=float, default=10.0, help="for each solve")
    limit_s = parser.parse_args(arguments).time_limit_s
    _say(f"GPT-2, {NUM_LAYERS} layers, width {WIDTH}, vocabulary {VOCABULARY}, batch")
    _say(f"{BATCH} x {SEQUENCE}, AdamW, budget {BUDGET}, {WORLD_SIZE} gloo processes,")
    _say(f"torch {torch.__version__}, seed 0\n")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, limit_s), nprocs=WORLD_SIZE)
        ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(WORLD_SIZE)]
    _say(
        "| options | grads | buckets | eager, predicted | eager, measured | plan, predicted | "
        "plan, measured per rank | overhead | first all-reduce, eager | plan | bits |"
    )
    _say("|---|---|---|---|---|---|---|---|---|---|---|")
    for rows in zip(*ranks, strict=True):
        one = rows[0]
        measured = ", ".join(f"{row['measured']}" for row in rows)
        _say(
            f"| {one['options']} | {one['grads']} | {one['bucket_bytes']} | "
            f"{one['eager_predicted']} | {one['eager_measured']} | {one['predicted']} | {measured} "
            f"| {one['overhead']:.1%} | {one['eager_first']:.2f} | {one['planned_first']:.2f} | "
            f"{'equal' if all(row['bits'] for row in rows) else 'DIFFERENT'} |"
        )


if __name__ == "__main__":
    main()
