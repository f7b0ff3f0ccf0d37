"""Models of published shapes without weights: built on ``meta``, they take no memory.

A name is looked up in :data:`SHAPES`. Its sample has labels, so that the model computes
its own loss. Everything else is the configuration's default, including dropout.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A configuration of Transformers.

    Parameters
    ----------
    model, config
        Names of the classes.
    options
        Options of the configuration.
    depth
        The options that set the number of layers.
    positions
        The option that limits the sequence, if there is one.
    kind
        The contents of the sample: text, text for a decoder's labels only, or images.
    source
        Where the figures come from.
    """

    model: str
    config: str
    options: Mapping[str, Any]
    depth: tuple[str, ...] = ("num_hidden_layers",)
    positions: str | None = "max_position_embeddings"
    kind: str = "text"
    source: str = ""


def _llama(vocab_size: int, source: str) -> Shape:
    return Shape(
        model="LlamaForCausalLM",
        config="LlamaConfig",
        options={
            "vocab_size": vocab_size,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "use_cache": False,
        },
        source=source,
    )


def _gpt2(width: int, layers: int, heads: int, source: str) -> Shape:
    return Shape(
        model="GPT2LMHeadModel",
        config="GPT2Config",
        options={
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "use_cache": False,
            "loss_type": "ForCausalLMLoss",
        },
        depth=("n_layer",),
        positions="n_positions",
        source=source,
    )


SHAPES: Mapping[str, Shape] = {
    "llama-70b": _llama(32000, "Touvron et al. 2023, arXiv:2307.09288, 70B"),
    "llama3-70b": _llama(128256, "Grattafiori et al. 2024, arXiv:2407.21783, 70B"),
    "gpt3-175b": _gpt2(12288, 96, 96, "Brown et al. 2020, arXiv:2005.14165, 175B"),
    "gpt2": _gpt2(768, 12, 12, "Radford et al. 2019, 124M"),
    "gpt2-xl": _gpt2(1600, 48, 25, "Radford et al. 2019, 1.5B"),
    "gptj-6b": Shape(
        model="GPTJForCausalLM",
        config="GPTJConfig",
        options={"use_cache": False, "loss_type": "ForCausalLMLoss"},
        depth=("n_layer",),
        positions="n_positions",
        source="Wang and Komatsuzaki 2021, 6B; Transformers has no fused attention for it",
    ),
    "bert": Shape(
        model="BertForMaskedLM",
        config="BertConfig",
        options={},
        source="Devlin et al. 2018, base",
    ),
    "llama-small": Shape(
        model="LlamaForCausalLM",
        config="LlamaConfig",
        options={
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "use_cache": False,
        },
        source="the width of BERT",
    ),
    "t5": Shape(
        model="T5ForConditionalGeneration",
        config="T5Config",
        options={
            "d_model": 768,
            "d_ff": 3072,
            "num_layers": 6,
            "num_decoder_layers": 6,
            "decoder_start_token_id": 0,
            "num_heads": 12,
            "use_cache": False,
        },
        depth=("num_layers", "num_decoder_layers"),
        positions=None,
        source="Raffel et al. 2020, base with half of its layers",
    ),
    "vit": Shape(
        model="ViTForImageClassification",
        config="ViTConfig",
        options={"num_labels": 1000},
        positions=None,
        kind="images",
        source="Dosovitskiy et al. 2020, base",
    ),
}


def build(
    name: str,
    *,
    batch: int,
    sequence: int,
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "meta",
) -> tuple[nn.Module, Sample]:
    """A model in training mode and a sample for it.

    Parameters
    ----------
    name
        A key of :data:`SHAPES`.
    batch, sequence
        Sizes of the sample; images have no sequence.
    dtype
        Dtype of the weights and of images.
    layers
        Number of layers instead of the published one.
    options
        Options instead of the published ones.
    device
        Where both lie.

    Raises
    ------
    ValueError
        When the name is unknown.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(SHAPES)}")
    _quiet_transformers()
    import transformers

    shape = SHAPES[name]
    settings = {**shape.options, **(options or {})}
    if layers is not None:
        settings |= dict.fromkeys(shape.depth, layers)
    config = getattr(transformers, shape.config)(**settings)
    if shape.positions and getattr(config, shape.positions) < sequence:
        setattr(config, shape.positions, sequence)
    with torch.device(device):
        model = getattr(transformers, shape.model)(config).to(dtype).train()
        return model, _sample(shape, config, batch, sequence, dtype)


class LossOnly(nn.Module):
    """A language model that returns only its loss, so that logits may be freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return loss


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _sample(shape: Shape, config: Any, batch: int, sequence: int, dtype: torch.dtype) -> Sample:
    if shape.kind == "images":
        size = (batch, config.num_channels, config.image_size, config.image_size)
        return {
            "pixel_values": torch.zeros(size, dtype=dtype),
            "labels": torch.zeros(batch, dtype=torch.long),
        }
    tokens = torch.zeros(batch, sequence, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _quiet_transformers() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
