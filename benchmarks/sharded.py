"""GPT-2 and LLaMA under ``fully_shard`` in several processes, with a plan in blocks and without.

``python -m benchmarks.sharded`` trains each model with its layers and its root sharded over gloo on
the CPU, resharded after forward and not. Reported for each budget: the peak of a rank as predicted
and as the allocator records it on every rank, without a plan and with one; the plan's predicted
overhead beside that of recomputing every layer; and whether losses and sharded gradients have the
bits of the same training without a plan. One process plans and saves, all load. With ``--repeats``
steps of all three are timed in turn, each from a barrier on.

Gloo's threads at times free a buffer of a collective, and the recorder does not hear of it: of
three records of a step the least counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from graph_capture.units import format_bytes
from planner import BlockPlan, InfeasibleBudgetError, measure, optimize
from solvers.strategies import STRATEGIES, apply_strategy

NUM_LAYERS, WIDTH, VOCABULARY, BATCH, SEQUENCE = 6, 256, 2_048, 4, 256
NUM_STEPS, NUM_RECORDS = 3, 3
PER_LAYER = "transformers_per_layer"
LAYERS = {"GPT-2": "transformer.h", "LLaMA": "model.layers"}
BUDGETS = ("80%", "half", "60%")
"""Shares of the peak without a plan; *half* lies halfway to the peak of recomputing each layer."""


def build(name: str) -> nn.Module:
    """Return the model, the same in every process."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "GPT-2":
        gpt2 = GPT2Config(
            vocab_size=VOCABULARY,
            n_layer=NUM_LAYERS,
            n_embd=WIDTH,
            n_head=4,
            n_positions=SEQUENCE,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(gpt2).train()
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=NUM_LAYERS,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_attention_heads=4,
        max_position_embeddings=SEQUENCE,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(llama).train()


def call(seed: int) -> dict[str, Any]:
    """Return a batch with labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}


def shard(model: nn.Module, name: str, *, reshard: bool) -> nn.Module:
    """Shard each layer, and then the root."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_submodule(LAYERS[name]).children():
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model)
    return model


def train(rank: int, model: nn.Module) -> list[torch.Tensor]:
    """Return losses, and this rank's gradients of the last step."""
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss = model(**call(10 * step + rank)).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [*losses, *(g.to_local() for g in gradients)]  # type: ignore[operator]


def peak_of(model: nn.Module) -> int:
    """Return the recorded peak of this rank's step, all ranks together."""
    records = [
        measure(model, call(0), optimizer="adamw", outputs="released", repeats=0).peak_bytes
        for _ in range(NUM_RECORDS)
    ]
    return min(records)


def every_layer_of(model: nn.Module, name: str) -> nn.Module:
    """Let each layer be recomputed as PyTorch does it beside ``fully_shard``."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    layers = set(model.get_submodule(LAYERS[name]).children())
    apply_activation_checkpointing(model, check_fn=layers.__contains__)
    return model


def in_turn(rank: int, models: dict[str, nn.Module], repeats: int) -> dict[str, float]:
    """Return the median time of each model's step over that of the first, less one."""
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(repeats + 1):
        for name, model in models.items():
            batch = call(10 * step + rank)
            torch.manual_seed(step)
            dist.barrier()
            begin = time.perf_counter()
            model(**batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            dist.barrier()
            if step:  # the first makes optimizers' state
                times[name].append(time.perf_counter() - begin)
    first = next(iter(times.values()))
    return {
        name: statistics.median(own / base for own, base in zip(each, first, strict=True)) - 1
        for name, each in times.items()
    }


def planned(name: str, ranks: int, *, reshard: bool, limit_s: float) -> list[dict[str, Any]]:
    """Plan for each budget, in one process, and return what the plans say."""
    asked: dict[str, Any] = {
        "granularity": "blocks",
        "blocks": f"{LAYERS[name]}.*",
        "optimizer": "adamw",
        "outputs": "released",
        "distributed": f"fsdp2:ranks={ranks},reshard_after_forward={reshard}",
        "time_limit_s": limit_s,
    }
    model = build(name)
    free = optimize(model, call(0), budget="100%", **asked)
    each = apply_strategy(STRATEGIES[PER_LAYER], free.graph)
    assert each.peak_bytes is not None
    assert each.cost_ns is not None
    every_layer = each.cost_ns / 1e3 / free.baseline_step_us - 1
    found = []
    for budget in BUDGETS:
        words: dict[str, Any] = {"budget": budget}
        if budget == "half":
            words = {"budget_bytes": (free.baseline_peak_bytes + each.peak_bytes) // 2}
        try:
            plan = optimize(model, call(0), **words, **asked)
        except InfeasibleBudgetError as error:
            found.append({"budget": budget, "least_bytes": error.min_budget_bytes})
            continue
        found.append({"budget": budget, "plan": plan, "every_layer": every_layer})
    return found


def work(rank: int, ranks: int, folder: str, limit_s: float, repeats: int) -> None:
    """Measure in one process, and write down a row for each model, resharding and budget."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    rows = []
    for name in LAYERS:
        for reshard in (True, False):
            listed = Path(folder, f"{name}-{reshard}.json")
            if rank == 0:
                said = planned(name, ranks, reshard=reshard, limit_s=limit_s)
                for i, row in enumerate(said):
                    if "plan" in row:
                        row["file"] = f"{folder}/{name}-{reshard}-{i}.plan"
                        row.pop("plan").save(row["file"])
                listed.write_text(json.dumps(said))
            dist.barrier()
            eager = shard(build(name), name, reshard=reshard)
            eager_peak, expected = peak_of(eager), train(rank, eager)
            for row in json.loads(listed.read_text()):
                row |= {"model": name, "reshard": reshard, "eager_measured": eager_peak}
                rows.append(row)
                if "file" not in row:
                    continue
                plan = BlockPlan.load(row["file"])
                model = plan.apply(shard(build(name), name, reshard=reshard))
                row |= {
                    "budget_bytes": plan.budget_bytes,
                    "eager_predicted": plan.baseline_peak_bytes,
                    "predicted": plan.predicted_peak_bytes,
                    "measured": peak_of(model),
                    "overhead": plan.overhead,
                    "bits": all(map(torch.equal, expected, train(rank, model))),
                }
                if repeats:
                    layers = every_layer_of(build(name), name)
                    layers = shard(layers, name, reshard=reshard)
                    row["times"] = in_turn(
                        rank, {"eager": eager, "plan": model, "layers": layers}, repeats
                    )
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _all(rows: Sequence[dict[str, Any]], key: str) -> str:
    """A figure of all ranks: once where they agree."""
    values = dict.fromkeys(f"{row[key]:,}" for row in rows)
    return " / ".join(values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit-s", type=float, default=10.0, help="for each solve")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=0, help="timed steps of each; 0 times none")
    options = parser.parse_args(arguments)
    ranks = options.ranks
    _say(f"{NUM_LAYERS} layers, width {WIDTH}, vocabulary {VOCABULARY}, batch {BATCH} x {SEQUENCE}")
    _say(f"per rank, AdamW, outputs released, {ranks} gloo processes, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, folder, options.time_limit_s, options.repeats), nprocs=ranks)
        found = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(ranks)]
    _say(
        "| model | resharded | eager, predicted | eager, measured | budget | bytes | plan, "
        "predicted | plan, measured | overhead | every layer | bits |"
        + (" time | every layer's |" if options.repeats else "")
    )
    _say(
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|---|"
        + "---:|---:|" * (options.repeats > 0)
    )
    for rows in zip(*found, strict=True):
        one = rows[0]
        start = f"| {one['model']} | {'yes' if one['reshard'] else 'no'} |"
        if "file" not in one:
            least = format_bytes(one["least_bytes"])
            _say(f"{start} | {_all(rows, 'eager_measured')} | {one['budget']} | from {least} on |")
            continue
        _say(
            f"{start} {one['eager_predicted']:,} | {_all(rows, 'eager_measured')} | "
            f"{one['budget']} | {one['budget_bytes']:,} | {one['predicted']:,} | "
            f"{_all(rows, 'measured')} | {one['overhead']:.1%} | {one['every_layer']:.1%} | "
            f"{'equal' if all(row['bits'] for row in rows) else 'DIFFERENT'} |"
            + "".join(
                f" {one['times'][which]:+.1%} |" for which in ("plan", "layers") if "times" in one
            )
        )


if __name__ == "__main__":
    main()
