"""More models of Transformers, from configurations of two narrow layers."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class LossOf(Enum):
    """Who computes the loss."""

    MODEL = "model"
    LOOP = "loop"


_NARROW: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_TWO_STACKS: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


def _make(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options)).train()

    return make


def _tokens(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(seed))


def _text(seed: int) -> dict[str, Tensor]:
    tokens = _tokens(seed, 97, 2, 16)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _padded(seed: int) -> dict[str, Tensor]:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, -3:] = 0
    return {**_text(seed), "attention_mask": mask}


def _image(size: int, labels: Callable[[int], Tensor]) -> Callable[[int], dict[str, Tensor]]:
    def sample(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(2, 3, size, size, generator=generator),
            "labels": labels(seed),
        }

    return sample


def _speech(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(2, 8, 40, generator=generator),
        "labels": _tokens(seed, 97, 2, 10),
    }


def _with_checkpointing() -> nn.Module:
    model = _make(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=100,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )()
    # Renamed within the fifth version; the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    return model


def _classes(seed: int) -> Tensor:
    return _tokens(seed, 5, 2)


_Entry = tuple[Callable[[], nn.Module], Callable[[int], Any], LossOf]

TRANSFORMERS: dict[str, _Entry] = {
    name: (make, sample, LossOf.MODEL)
    for name, make, sample in (
        ("gpt2 with its own checkpointing", _with_checkpointing, _text),
        (
            "albert",
            _make("AlbertForMaskedLM", "AlbertConfig", **_NARROW, embedding_size=16),
            _padded,
        ),
        ("roberta", _make("RobertaForMaskedLM", "RobertaConfig", **_NARROW), _padded),
        (
            "bloom",
            _make(
                "BloomForCausalLM",
                "BloomConfig",
                vocab_size=100,
                hidden_size=32,
                n_layer=2,
                n_head=4,
            ),
            _text,
        ),
        (
            "gemma2",
            _make(
                "Gemma2ForCausalLM", "Gemma2Config", **_NARROW, num_key_value_heads=1, head_dim=8
            ),
            _text,
        ),
        (
            "mixtral",
            _make(
                "MixtralForCausalLM",
                "MixtralConfig",
                **_NARROW,
                num_key_value_heads=2,
                num_local_experts=4,
            ),
            _text,
        ),
        (
            "bart",
            _make(
                "BartForConditionalGeneration",
                "BartConfig",
                **_TWO_STACKS,
                max_position_embeddings=32,
            ),
            _padded,
        ),
        (
            "whisper",
            _make(
                "WhisperForConditionalGeneration",
                "WhisperConfig",
                **_TWO_STACKS,
                num_mel_bins=8,
                max_source_positions=20,
                max_target_positions=20,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            ),
            _speech,
        ),
        (
            "segformer",
            _make(
                "SegformerForSemanticSegmentation",
                "SegformerConfig",
                depths=[1, 1, 1, 1],
                hidden_sizes=[8, 16, 16, 32],
                num_attention_heads=[1, 1, 2, 4],
                decoder_hidden_size=16,
                num_labels=5,
            ),
            _image(32, lambda seed: _tokens(seed, 5, 2, 32, 32)),
        ),
        (
            "swin",
            _make(
                "SwinForImageClassification",
                "SwinConfig",
                image_size=32,
                patch_size=2,
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 4],
                window_size=4,
                num_labels=5,
            ),
            _image(32, _classes),
        ),
        (
            "convnext",
            _make(
                "ConvNextForImageClassification",
                "ConvNextConfig",
                hidden_sizes=[8, 16, 16, 32],
                depths=[1, 1, 1, 1],
                num_labels=5,
                drop_path_rate=0.1,
            ),
            _image(32, _classes),
        ),
        (
            "mamba",
            _make(
                "MambaForCausalLM",
                "MambaConfig",
                vocab_size=100,
                hidden_size=16,
                num_hidden_layers=1,
                state_size=4,
            ),
            lambda seed: {k: v[:, :8].clone() for k, v in _text(seed).items()},
        ),
    )
}
