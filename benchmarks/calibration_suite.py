"""The models that a roofline is fitted to: those of the tests, and some wider transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .testing.zoo import (
    ZOO,
    Case,
)


def _wider(name: str, width: int, length: int) -> Case:
    """A 4-layer transformer between the small ones of the tests and real ones."""
    vocab = 4096

    def build() -> nn.Module:
        import transformers as hf

        if name == "bert":
            bert = hf.BertConfig(
                vocab_size=vocab,
                hidden_size=width,
                num_hidden_layers=4,
                num_attention_heads=width // 64,
                intermediate_size=4 * width,
                max_position_embeddings=length,
            )
            return hf.BertForMaskedLM(bert).train()
        if name == "llama":
            llama = hf.LlamaConfig(
                vocab_size=vocab,
                hidden_size=width,
                num_hidden_layers=4,
                num_attention_heads=width // 64,
                num_key_value_heads=max(1, width // 128),
                intermediate_size=8 * width // 3 // 64 * 64,
                max_position_embeddings=length,
            )
            return hf.LlamaForCausalLM(llama).train()
        gpt2 = hf.GPT2Config(
            vocab_size=vocab,
            n_positions=length,
            n_embd=width,
            n_layer=4,
            n_head=width // 64,
            bos_token_id=0,
            eos_token_id=0,
        )
        return hf.GPT2LMHeadModel(gpt2).train()

    def sample(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, vocab, (4, length), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return Case(name=f"{name}_{width}", build=build, sample=sample)


SUITE: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: ZOO[name]("small") for name in ZOO if name != "gpt2_logits"},
    "gpt2_512": lambda: _wider("gpt2", 512, 256),
    "llama_256": lambda: _wider("llama", 256, 256),
    "bert_256": lambda: _wider("bert", 256, 256),
}
"""Models by name; ``gpt2_logits`` of the tests makes the calls of ``gpt2``."""
