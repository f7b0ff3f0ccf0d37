"""The models of the check, in three sizes. Random weights: nothing is downloaded.

``full`` is for a card of 80 GB, ``small`` for one of 16 to 24 GB, ``tiny`` for a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graph_capture.calls.autocast import autocast_as

Size = Literal["full", "small", "tiny"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model to train at one size.

    Parameters
    ----------
    name, size
        As on the command line.
    words
        Depth, width, batch and length, for the report.
    build
        Builds the module in training mode, on the current ``torch.device``.
    sample
        From a seed to the keyword arguments of a call, on the CPU; the global
        generator stays as it is.
    blocks
        The modules that per-block checkpointing wraps if the model itself does not offer
        it.
    autocast
        Dtype of the autocast that forward and loss run under, or ``None``.
    optimizer
        Its name; its state and step count in the peaks.
    """

    name: str
    size: Size
    words: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], dict[str, Tensor]]
    blocks: Callable[[Any], list[nn.Module]]
    autocast: torch.dtype | None
    optimizer: str = "adamw"

    @property
    def label(self) -> str:
        """Name and size, for progress and errors."""
        return f"{self.name}, {self.size}"

    def context(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        """The autocast of this model on a device type."""
        if self.autocast is None:
            return contextlib.nullcontext()
        if device_type == "meta":
            raise ValueError("autocast needs a device that computes; name the device of the step")
        return autocast_as(device_type, self.autocast)


def subjects(size: Size, names: tuple[str, ...] = ()) -> list[Subject]:
    """The named models (all without names) at one size.

    Raises
    ------
    ValueError
        When a name is unknown.
    """
    unknown = sorted(set(names) - SUBJECTS.keys())
    if unknown:
        raise ValueError(f"unknown model {', '.join(unknown)}; known are {', '.join(SUBJECTS)}")
    return [SUBJECTS[name](size) for name in names or SUBJECTS]


def gpt2(size: Size) -> Subject:
    """GPT-2 medium: learned positions, tied embeddings, dropout 0.1 inside attention, too."""
    layers, width, heads, batch, length, vocab = {
        "full": (24, 1024, 16, 16, 1024, 50257),
        "small": (12, 768, 12, 8, 512, 50257),
        "tiny": (2, 96, 4, 4, 96, 1000),
    }[size]

    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        model = GPT2LMHeadModel(config).train()
        # The default loss; unnamed, it gives a warning, at which Dynamo breaks the graph.
        model.loss_type = "ForCausalLM"
        return model

    return Subject(
        name="gpt2",
        size=size,
        words=_text(layers, width, batch, length, vocab),
        build=build,
        sample=_language(batch, length, vocab),
        blocks=lambda model: list(model.transformer.h),
        autocast=None if size == "tiny" else torch.bfloat16,
    )


def llama(size: Size) -> Subject:
    """LLaMA of 1.2 billion parameters: rotary positions, grouped-query attention, no dropout."""
    layers, width, inner, heads, groups, batch, length, vocab = {
        "full": (16, 2048, 8192, 32, 8, 4, 2048, 128256),
        "small": (12, 768, 2048, 12, 4, 8, 1024, 32000),
        "tiny": (2, 96, 256, 4, 2, 4, 64, 1000),
    }[size]

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config).train()

    return Subject(
        name="llama",
        size=size,
        words=f"{_text(layers, width, batch, length, vocab)}, {heads} heads over {groups}",
        build=build,
        sample=_language(batch, length, vocab),
        blocks=lambda model: list(model.model.layers),
        autocast=torch.bfloat16,
    )


def vit(size: Size) -> Subject:
    """ViT-L/16 with dropout 0.1, an image classifier."""
    layers, width, heads, batch, image, patch = {
        "full": (24, 1024, 16, 192, 224, 16),
        "small": (12, 768, 12, 64, 224, 16),
        "tiny": (2, 96, 4, 8, 64, 8),
    }[size]

    def build() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            image_size=image,
            patch_size=patch,
            num_labels=1000,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            attn_implementation="sdpa",
        )
        return ViTForImageClassification(config).train()

    return Subject(
        name="vit",
        size=size,
        words=f"{layers} layers, width {width}, batch {batch} x {image} x {image}, patch {patch}",
        build=build,
        sample=_images(batch, image),
        blocks=_vit_blocks,
        autocast=None if size == "tiny" else torch.bfloat16,
    )


def resnet50(size: Size) -> Subject:
    """ResNet-50 in float32: bottlenecks with batch norm, whose buffers a step changes."""
    batch, image, shape = {
        "full": (512, 224, {}),
        "small": (96, 224, {}),
        "tiny": (
            8,
            64,
            {"depths": [2, 2], "hidden_sizes": [64, 128], "embedding_size": 32},
        ),
    }[size]

    def build() -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        return ResNetForImageClassification(ResNetConfig(num_labels=1000, **shape)).train()

    return Subject(
        name="resnet50",
        size=size,
        words=f"stages {shape.get('depths', [3, 4, 6, 3])}, batch {batch} x {image} x {image}",
        build=build,
        sample=_images(batch, image),
        blocks=lambda model: [b for stage in model.resnet.encoder.stages for b in stage.layers],
        autocast=None,
        optimizer="sgd_momentum",
    )


def _vit_blocks(model: Any) -> list[nn.Module]:
    """Transformers moved the list of layers between releases."""
    encoder = getattr(model.vit, "encoder", model.vit)
    for name in ("layer", "layers"):
        if hasattr(encoder, name):
            return list(getattr(encoder, name))
    raise ValueError(f"no list of layers was found in {type(model).__name__}")


def _text(layers: int, width: int, batch: int, length: int, vocab: int) -> str:
    return f"{layers} layers, width {width}, batch {batch} x {length}, vocabulary {vocab}"


def _language(batch: int, length: int, vocab: int) -> Callable[[int], dict[str, Tensor]]:
    def sample(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, vocab, (batch, length), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return sample


def _images(batch: int, image: int) -> Callable[[int], dict[str, Tensor]]:
    def sample(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(batch, 3, image, image, generator=generator),
            "labels": torch.randint(0, 1000, (batch,), generator=generator),
        }

    return sample


SUBJECTS: dict[str, Callable[[Size], Subject]] = {
    factory.__name__: factory for factory in (gpt2, llama, vit, resnet50)
}
