"""GPT-2 and LLaMA of Transformers under FSDP2 in two processes, by plans for one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner import BlockPlan, measure, optimize
from tests.ranks import spawn_ranks

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed"),
]

LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}
WORDS: dict[str, Any] = {"optimizer": "adamw", "outputs": "released"}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    none: dict[str, Any] = {"vocab_size": 200, "bos_token_id": None, "eos_token_id": None}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=3, n_embd=64, n_head=2, n_positions=64, **none)
        return transformers.GPT2LMHeadModel(config).train()
    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        max_position_embeddings=64,
        **none,
    )
    return transformers.LlamaForCausalLM(config).train()


def _call() -> dict[str, Any]:
    tokens = torch.randint(0, 200, (4, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}


def _sharded(name: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = _model(name)
    for layer in model.get_submodule(LAYERS[name]).children():
        fully_shard(layer)
    fully_shard(model)
    return model


def _peak(model: nn.Module) -> int:
    """The least of some records, since gloo's threads free buffers unheard."""
    return min(measure(model, _call(), repeats=0, **WORDS).peak_bytes for _ in range(6))


def _step(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    loss = model(**_call()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.to_local() for g in gradients)]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    results = {}
    for name in LAYERS:
        eager = _sharded(name)
        planned = BlockPlan.load(f"{folder}/{name}.json").apply(_sharded(name))
        peaks = _peak(eager), _peak(planned)
        expected, found = _step(eager), _step(planned)
        same = len(expected) > 30 and all(map(torch.equal, expected, found))
        results[name] = (*peaks, same)
    torch.save(results, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_peaks_and_bits_of_each_rank(tmp_path: Path) -> None:
    """The plan's within 1 % of the prediction, and never above; eager's within 2 %.

    Autograd holds what a node reads until all of its gradients are there, and eager's prediction
    lets go of it after the first: gelu's product of two activations is this model's peak.
    """
    plans = {}
    for name in LAYERS:
        plans[name] = optimize(
            _model(name),
            _call(),
            budget="75%",
            granularity="blocks",
            blocks=f"{LAYERS[name]}.*",
            distributed="fsdp2:ranks=2",
            time_limit_s=1,
            **WORDS,
        )
        plans[name].save(tmp_path / f"{name}.json")
    spawn_ranks(_work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for name, (eager, planned, same) in torch.load(tmp_path / str(rank)).items():
            plan = plans[name]
            assert plan.schedule.recomputed()
            assert same
            assert eager == pytest.approx(plan.baseline_peak_bytes, rel=0.02)
            assert planned == pytest.approx(plan.predicted_peak_bytes, rel=0.01)
            assert planned <= plan.predicted_peak_bytes <= plan.budget_bytes
