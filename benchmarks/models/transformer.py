"""BERT, GPT-2, LLaMA, T5 and ViT from Transformers' configurations, by ``benchmarks/shapes.py``.

Dropout is the configurations' default: 0.1 everywhere for BERT, GPT-2 and T5, none
for LLaMA and ViT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..shapes import SHAPES, build
from .subject import Drawn, Size, Subject


class Text(NamedTuple):
    """Sizes of a language model."""

    layers: int
    width: int
    heads: int
    batch: int
    sequence: int
    vocabulary: int


TINY = Text(2, 32, 2, 2, 16, 64)
RECORD = Text(8, 256, 8, 4, 128, 4096)


def _text(
    name: str, shape: str, size: Size, text: Text, options: Mapping[str, Any], source: str
) -> Subject:
    tokens = Drawn(shape=(text.batch, text.sequence), below=text.vocabulary)

    def make() -> nn.Module:
        model, _ = build(
            shape,
            batch=text.batch,
            sequence=text.sequence,
            layers=text.layers,
            options={"vocab_size": text.vocabulary, **options},
            device=_current_device(),
        )
        return model

    return Subject(
        name=name,
        size=size,
        description=f"{text.layers} layers, width {text.width}, {text.heads} heads, batch "
        f"{text.batch} x {text.sequence}, vocabulary {text.vocabulary}",
        source=source,
        make=make,
        tensors={"input_ids": tokens, "labels": tokens},
    )


def _current_device() -> str:
    """The device on which tensors are currently made."""
    return str(nn.Parameter().device)


def bert(size: Size) -> Subject:
    """Masked language model; at ``paper`` base with its 512 tokens."""
    text = {"tiny": TINY, "record": RECORD, "paper": Text(12, 768, 12, 16, 512, 30522)}[size]
    options = {
        "hidden_size": text.width,
        "num_attention_heads": text.heads,
        "intermediate_size": 4 * text.width,
        "max_position_embeddings": text.sequence,
    }
    return _text("bert", "bert", size, text, options, "Devlin et al. 2018, arXiv:1810.04805")


def gpt2(size: Size) -> Subject:
    """Causal language model with tied embeddings; at ``paper`` the 124 million parameters."""
    text = {"tiny": TINY, "record": RECORD, "paper": Text(12, 768, 12, 8, 1024, 50257)}[size]
    options = {
        "n_embd": text.width,
        "n_head": text.heads,
        "n_positions": text.sequence,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _text("gpt2", "gpt2", size, text, options, "Radford et al. 2019")


def llama(size: Size) -> Subject:
    """Causal language model with rotary positions; at ``paper`` 7B with its 2,048 tokens."""
    text = {"tiny": TINY, "record": RECORD, "paper": Text(32, 4096, 32, 4, 2048, 32000)}[size]
    inner = {"tiny": 80, "record": 688, "paper": 11008}[size]
    options = {
        "hidden_size": text.width,
        "intermediate_size": inner,
        "num_attention_heads": text.heads,
        # Groups of two heads share keys and values in the small sizes; the 7B has none.
        "num_key_value_heads": text.heads if size == "paper" else text.heads // 2,
        "max_position_embeddings": text.sequence,
    }
    source = "Touvron et al. 2023, arXiv:2302.13971"
    return _text("llama", "llama-small", size, text, options, source)


def t5(size: Size) -> Subject:
    """Encoder and decoder of the same depth; at ``paper`` base with its 512 tokens."""
    text = {
        "tiny": TINY._replace(layers=1),
        "record": RECORD._replace(layers=4, sequence=96),
        "paper": Text(12, 768, 12, 8, 512, 32128),
    }[size]
    options = {
        "d_model": text.width,
        "d_kv": text.width // text.heads,
        "d_ff": 4 * text.width,
        "num_heads": text.heads,
    }
    return _text("t5", "t5", size, text, options, "Raffel et al. 2019, arXiv:1910.10683")


def vit(size: Size) -> Subject:
    """Image classifier; at ``paper`` base with patches of 16 x 16 pixels."""
    layers, width, heads, batch, image, patch, classes = {
        "tiny": (2, 32, 2, 2, 16, 8, 10),
        "record": (8, 192, 6, 16, 64, 8, 100),
        "paper": (12, 768, 12, 64, 224, 16, 1000),
    }[size]
    options = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": image,
        "patch_size": patch,
        "num_labels": classes,
    }

    def make() -> nn.Module:
        model, _ = build(
            "vit", batch=1, sequence=0, layers=layers, options=options, device=_current_device()
        )
        return model

    return Subject(
        name="vit",
        size=size,
        description=f"{layers} layers, width {width}, {heads} heads, batch {batch} x {image} x "
        f"{image}, patches {patch} x {patch}",
        source=SHAPES["vit"].source,
        make=make,
        tensors={
            "pixel_values": Drawn(shape=(batch, 3, image, image)),
            "labels": Drawn(shape=(batch,), below=classes),
        },
    )
