"""A LLaMA of four narrow layers, and a micro-batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

IN_LAYERS = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
"""Of the model's own plan, what concerns its layers."""

WIDTH, INNER, VOCABULARY, ROWS, TOKENS = 64, 96, 50, 2, 16


def tiny_llama(device: str = "cpu", layers: int = 4) -> nn.Module:
    """The model in training mode, with weights by a fixed seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=()), torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train()


def tokens(device: str = "cpu") -> dict[str, Any]:
    """Tokens and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids.clone()}
