"""What the operating system sees of steps in two processes, beside what was predicted.

``python -m benchmarks.resident_set`` trains GPT-2 under ``DistributedDataParallel`` with AdamW,
for each way of :mod:`benchmarks.data_parallel`, with a plan and without, each time in new
processes. Per row: the highest resident set of each rank during its last steps, less that
before the model was built, beside the predicted peak. A prediction knows tensors only; the
rest is what libraries, threads and the heap's own pages take.

Linux only: the mark is ``VmHWM``, set back through ``/proc/self/clear_refs``. Blocks of 64 KiB
and more are mapped by themselves (``MALLOC_MMAP_THRESHOLD_``), so that their pages go back when
they are freed, as they do in an allocator of a device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from planner import Plan, optimize

from .data_parallel import BUDGET, MICRO_BATCHES, WAYS, WORLD_SIZE, call, gpt2

WARM_STEPS, MARKED_STEPS = 3, 2
"""A wrapper orders its buckets after the first step; the optimizer makes its state in it."""
MMAP_THRESHOLD = "65536"


def resident(mark: str) -> int:
    """Return ``VmRSS``, what is resident now, or ``VmHWM``, the most since a reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{mark}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reset_highest() -> None:
    """Let ``VmHWM`` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def train(
    model: nn.Module,
    rank: int,
    first: int,
    num_steps: int,
    num_micro: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Take steps of a usual loop, which lets go of outputs once it has the loss."""
    for step in range(first, first + num_steps):
        for micro in range(num_micro):
            waits = isinstance(model, DistributedDataParallel) and micro < num_micro - 1
            with model.no_sync() if waits else nullcontext():
                torch.manual_seed(100 * step + micro)
                model(**call(1000 * step + 10 * micro + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_plan(_rank: int, folder: str, way: int, time_limit_s: float) -> None:
    """Plan in a process of its own, whose heap no one measures."""
    warnings.simplefilter("ignore")
    options, grads = WAYS[way]
    plan = optimize(
        gpt2(),
        call(0),
        budget=BUDGET,
        time_limit_s=time_limit_s,
        optimizer="adamw",
        outputs="released",
        grads=grads,
        distributed=":".join(["ddp", *filter(None, [",".join(options)])]),
    )
    plan.save(Path(folder, f"{way}.plan"))


def work(rank: int, folder: str, way: int, planned: bool) -> None:
    """Train in one process and write down what was seen."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{way}-{planned}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD_SIZE)
    options, grads = WAYS[way]
    plan = Plan.load(Path(folder, f"{way}.plan"))
    # Libraries' code and buffers, and what Python needs for a plan, are resident before.
    first = gpt2()
    if planned:
        plan.apply(DistributedDataParallel(first, **options))
    train(first, rank, 0, 1, 1, torch.optim.AdamW(first.parameters()))
    del first
    gc.collect()
    before = resident("VmRSS")
    wrapper = DistributedDataParallel(gpt2(), **options)
    if planned:
        plan.apply(wrapper)
    optimizer = torch.optim.AdamW(wrapper.parameters())
    num_micro = MICRO_BATCHES if grads == "accumulated" else 1
    train(wrapper, rank, 0, WARM_STEPS, num_micro, optimizer)
    reset_highest()
    train(wrapper, rank, WARM_STEPS, MARKED_STEPS, num_micro, optimizer)
    seen = {
        "resident": resident("VmHWM") - before,
        "predicted": plan.predicted_peak_bytes if planned else plan.baseline_peak_bytes,
    }
    Path(folder, f"{way}-{planned}-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit-s", type=float, default=10.0, help="for each solve")
    limit_s = parser.parse_args(arguments).time_limit_s
    os.environ["MALLOC_MMAP_THRESHOLD_"] = MMAP_THRESHOLD  # read when a process starts
    _say("| options | grads | | predicted, MB | resident, MB per rank |\n|---|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for way, (options, grads) in enumerate(WAYS):
            mp.spawn(make_plan, (folder, way, limit_s))
            for planned in (False, True):
                mp.spawn(work, (folder, way, planned), nprocs=WORLD_SIZE)
                files = (Path(folder, f"{way}-{planned}-{r}.json") for r in range(WORLD_SIZE))
                ranks = [json.loads(file.read_text()) for file in files]
                each = ", ".join(f"{rank['resident'] / 1e6:.1f}" for rank in ranks)
                predicted = f"{ranks[0]['predicted'] / 1e6:.1f}"
                what = (
                    f"{', '.join(options) or 'none'} | {grads} | {'plan' if planned else 'eager'}"
                )
                _say(f"| {what} | {predicted} | {each} |")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
