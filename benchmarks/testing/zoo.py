"""Models for every end-to-end test, small enough for a CPU.

``ZOO[name](size)`` gives a :class:`Case`. There are two sizes: ``"tiny"`` (a step takes
well under a second) and ``"small"`` (more layers, longer sequences, shapes for which
recomputation pays). Everything is built from a configuration with random weights;
nothing is downloaded.

Transformers' configurations keep their defaults, including ``use_cache=True``, unless
width and depth need something else: that is what users have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = Literal["tiny", "small"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model to train.

    Parameters
    ----------
    name
        ``"gpt2"``; the key in :data:`ZOO`.
    build
        Builds the module in training mode. Weights come from the global
        generator: seed it first.
    sample
        Maps a seed to an input: a tensor, a tuple of positional arguments or a dict of
        keyword arguments. Leaves the global generator alone.
    loss_fn
        Computes the scalar loss from the output, if the output has none.
    autocast
        Runs forward and loss under ``torch.autocast("cpu", autocast)``.
    marks
        pytest marks of tests on this case.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], Any]
    loss_fn: Callable[[Any], Tensor] | None = None
    autocast: torch.dtype | None = None
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast of the case, or nothing."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", self.autocast)

    def make(self, seed: int = 0) -> nn.Module:
        """Build the module with its own seed; the global generator stays as it was."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self.build()


def cases(size: Size = "tiny", *names: str) -> list[Any]:
    """``pytest.param`` of the named cases (all without names), for ``parametrize("case", …)``."""
    chosen = [ZOO[name](size) for name in names or ZOO]
    return [pytest.param(case, id=case.name, marks=case.marks) for case in chosen]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(seed: int, vocab: int, *shape: int) -> Tensor:
    return torch.randint(0, vocab, shape, generator=_generator(seed))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _mask(batch: int, length: int) -> Tensor:
    """Padding of growing length: row ``i`` lacks its last ``i`` tokens."""
    lengths = length - torch.arange(batch)
    return (torch.arange(length) < lengths[:, None]).long()


# --- Transformers ------------------------------------------------------------


def gpt2(size: Size) -> Case:
    """GPT-2 language model, tied embeddings, dropout 0.1."""
    layers, width, length, vocab = (2, 64, 32, 512) if size == "tiny" else (6, 128, 128, 1000)

    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config).train()

    def sample(seed: int) -> dict[str, Tensor]:
        tokens = _tokens(seed, vocab, 4, length)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return Case(name="gpt2", build=build, sample=sample)


def gpt2_bf16(size: Size) -> Case:
    """GPT-2 with float32 weights under bfloat16 autocast."""
    return replace(gpt2(size), name="gpt2_bf16", autocast=torch.bfloat16)


def gpt2_logits(size: Size) -> Case:
    """GPT-2 without labels: logits and key-value cache come back, the loop computes the loss."""
    case = gpt2(size)

    def loss_fn(output: Any) -> Tensor:
        logits = output.logits
        labels = torch.arange(logits.shape[1]).expand(logits.shape[0], -1)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return replace(
        case,
        name="gpt2_logits",
        sample=lambda seed: {"input_ids": case.sample(seed)["input_ids"]},
        loss_fn=loss_fn,
    )


def bert(size: Size) -> Case:
    """BERT masked language model, padded batch, dropout 0.1."""
    layers, width, length, vocab = (2, 64, 32, 512) if size == "tiny" else (6, 128, 128, 1000)

    def build() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=length,
        )
        return BertForMaskedLM(config).train()

    def sample(seed: int) -> dict[str, Tensor]:
        tokens = _tokens(seed, vocab, 4, length)
        hidden = torch.rand(4, length, generator=_generator(seed + 1)) < 0.15
        hidden[:, 0] = True
        return {
            "input_ids": tokens.masked_fill(hidden, 3),
            "attention_mask": _mask(4, length),
            "labels": tokens.masked_fill(~hidden, -100),
        }

    return Case(name="bert", build=build, sample=sample)


def llama(size: Size) -> Case:
    """LLaMA with grouped-query attention: 4 heads over 2 key-value heads."""
    layers, width, length, vocab = (2, 64, 32, 512) if size == "tiny" else (6, 128, 128, 1000)

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=8 * width // 3 // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length,
        )
        return LlamaForCausalLM(config).train()

    def sample(seed: int) -> dict[str, Tensor]:
        tokens = _tokens(seed, vocab, 4, length)
        return {"input_ids": tokens, "labels": tokens.clone()}

    return Case(name="llama", build=build, sample=sample)


def t5(size: Size) -> Case:
    """T5 encoder-decoder, tied embeddings, dropout 0.1."""
    layers, width, length, vocab = (1, 64, 24, 512) if size == "tiny" else (4, 128, 96, 1000)

    def build() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=vocab,
            d_model=width,
            d_kv=width // 4,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=4,
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config).train()

    def sample(seed: int) -> dict[str, Tensor]:
        return {
            "input_ids": _tokens(seed, vocab, 4, length),
            "attention_mask": _mask(4, length),
            "labels": _tokens(seed + 1, vocab, 4, length // 2),
        }

    return Case(name="t5", build=build, sample=sample)


def vit(size: Size) -> Case:
    """ViT image classifier with labels."""
    layers, width, image = (2, 64, 32) if size == "tiny" else (6, 128, 64)

    def build() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            image_size=image,
            patch_size=8,
            num_labels=10,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
        return ViTForImageClassification(config).train()

    def sample(seed: int) -> dict[str, Tensor]:
        return {
            "pixel_values": _normal(seed, 4, 3, image, image),
            "labels": _tokens(seed, 10, 4),
        }

    return Case(name="vit", build=build, sample=sample)


def resnet50(size: Size) -> Case:
    """ResNet-50's bottleneck blocks with batch norm; narrow when tiny."""

    def build() -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        shape: dict[str, Any] = {"depths": [3, 4, 6, 3]}
        if size == "tiny":
            shape = {
                "depths": [2, 2],
                "hidden_sizes": [32, 64],
                "embedding_size": 16,
            }
        return ResNetForImageClassification(ResNetConfig(num_labels=10, **shape)).train()

    def sample(seed: int) -> dict[str, Tensor]:
        image = 32 if size == "tiny" else 96
        return {
            "pixel_values": _normal(seed, 4, 3, image, image),
            "labels": _tokens(seed, 10, 4),
        }

    return Case(name="resnet50", build=build, sample=sample)


# --- Written by hand ---------------------------------------------------------


class _ConvBlock(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Contracting and expanding path with skip connections."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(levels)]
        self.down = nn.ModuleList(
            _ConvBlock(a, b) for a, b in zip([3, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2)
            for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.merge = nn.ModuleList(_ConvBlock(2 * a, a) for a in widths[-2::-1])
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


def unet(size: Size) -> Case:
    """U-Net with batch norm, dropout and in-place ReLU; one label for each pixel."""
    width, levels, image = (8, 3, 32) if size == "tiny" else (16, 4, 64)
    labels = _tokens(17, 4, 2, image, image)
    return Case(
        name="unet",
        build=lambda: UNet(width, levels).train(),
        sample=lambda seed: _normal(seed, 2, 3, image, image),
        loss_fn=lambda logits: F.cross_entropy(logits, labels),
    )


class _EncoderClassifier(nn.Module):
    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0.1, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(hidden.mean(dim=1))


def transformer_encoder(size: Size) -> Case:
    """nn.TransformerEncoder with dropout and a padding mask, classified from its mean."""
    layers, width, length = (2, 64, 32) if size == "tiny" else (6, 128, 128)
    labels = _tokens(17, 5, 4)
    return Case(
        name="transformer_encoder",
        build=lambda: _EncoderClassifier(512, width, layers).train(),
        sample=lambda seed: (_tokens(seed, 512, 4, length), _mask(4, length) == 0),
        loss_fn=lambda logits: F.cross_entropy(logits, labels),
    )


def _mlp(width: int, layers: int) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks += [nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*blocks, nn.Linear(width, 10))


def mlp_frozen(size: Size) -> Case:
    """MLP with the first third and one layer in the middle frozen."""
    width, layers, batch = (64, 6, 32) if size == "tiny" else (256, 12, 256)
    labels = _tokens(17, 10, batch)

    def build() -> nn.Module:
        model = _mlp(width, layers)
        for i in (*range(layers), 3 * (layers // 2)):
            model[i].requires_grad_(False)
        return model.train()

    return Case(
        name="mlp_frozen",
        build=build,
        sample=lambda seed: _normal(seed, batch, width),
        loss_fn=lambda logits: F.cross_entropy(logits, labels),
    )


def mlp_bf16(size: Size) -> Case:
    """MLP with float32 weights under bfloat16 autocast."""
    width, layers, batch = (64, 4, 32) if size == "tiny" else (256, 12, 256)
    labels = _tokens(17, 10, batch)
    return Case(
        name="mlp_bf16",
        build=lambda: _mlp(width, layers).train(),
        sample=lambda seed: _normal(seed, batch, width),
        loss_fn=lambda logits: F.cross_entropy(logits.float(), labels),
        autocast=torch.bfloat16,
    )


class Scores(NamedTuple):
    """A named tuple as an output."""

    tokens: Tensor
    pooled: Tensor


class ManyOutputs(nn.Module):
    """Tied weights, unused parameters, integer inputs; tuples and dicts come back."""

    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(width, 3)
        self.never_read = nn.Parameter(torch.zeros(7))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> tuple[Scores, dict[str, Any]]:
        self.num_calls += 1
        hidden = self.embedding(tokens) * scale
        for block in self.blocks:
            hidden = hidden + F.silu(block(hidden))
        normed = self.norm(hidden)
        scores = Scores(self.head(normed), normed.mean(dim=1))
        extras = {
            "hidden": hidden,
            "best": scores.tokens.argmax(dim=-1),
            "nothing": None,
            "view": [normed[:, 0], normed.detach().sum()],
        }
        return scores, extras


def many_outputs(size: Size) -> Case:
    """Every output that requires grad is differentiated: there is no loss."""
    width, layers, length = (64, 3, 16) if size == "tiny" else (128, 8, 64)
    return Case(
        name="many_outputs",
        build=lambda: ManyOutputs(512, width, layers).train(),
        sample=lambda seed: {"tokens": _tokens(seed, 512, 4, length), "scale": 0.5},
    )


class _Recurrent(nn.Module):
    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width, padding_idx=0)
        self.recurrent = nn.LSTM(width, width, layers, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embedding(tokens[:, :-1]))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


def lstm(size: Size) -> Case:
    """Embedding and nn.LSTM as a language model; the output is the scalar loss itself."""
    layers, width, length = (2, 32, 12) if size == "tiny" else (2, 128, 48)
    return Case(
        name="lstm",
        build=lambda: _Recurrent(512, width, layers).train(),
        sample=lambda seed: _tokens(seed, 512, 4, length),
    )


class _Experts(nn.Module):
    """Two of several experts for each token, all of them computed (no ragged shapes)."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.inner = nn.Parameter(torch.randn(experts, width, 2 * width) * width**-0.5)
        self.outer = nn.Parameter(torch.randn(experts, 2 * width, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(dim=-1).topk(2, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        gate = torch.zeros_like(self.router(x)).scatter(-1, chosen, weights)
        hidden = F.gelu(torch.einsum("btd,edh->beth", x, self.inner))
        expert_out = torch.einsum("beth,ehd->betd", hidden, self.outer)
        return torch.einsum("bte,betd->btd", gate, expert_out)


class _Routed(nn.Module):
    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.experts = nn.ModuleList(_Experts(width, 4) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, experts in zip(self.norms, self.experts, strict=True):
            x = x + self.dropout(experts(norm(x)))
        return self.head(x)


def mixture_of_experts(size: Size) -> Case:
    """A router picks two of four experts by top-k; choices must not flip when recomputed."""
    layers, width, length = (2, 32, 16) if size == "tiny" else (6, 64, 64)
    labels = _tokens(17, 512, 4, length)
    return Case(
        name="mixture_of_experts",
        build=lambda: _Routed(512, width, layers).train(),
        sample=lambda seed: _tokens(seed, 512, 4, length),
        loss_fn=lambda logits: F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
    )


class _DepthwiseBlock(nn.Module):
    """ConvNeXt's block, with a random skip of whole samples (stochastic depth)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.scale * self.narrow(F.gelu(self.widen(y)))).permute(0, 3, 1, 2)
        if self.training:
            y = y * torch.empty(len(x), 1, 1, 1).bernoulli_(0.9) / 0.9
        return x + y


def convnext(size: Size) -> Case:
    """Depthwise CNN in the manner of ConvNeXt, then of MobileNet (hard-swish, batch norm)."""
    width, blocks, image = (16, 2, 32) if size == "tiny" else (32, 6, 64)
    labels = _tokens(17, 10, 4)

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4),
            *(_DepthwiseBlock(width) for _ in range(blocks)),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Hardswish(inplace=True),
            nn.Conv2d(width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1, inplace=True),
            nn.Linear(2 * width, 10),
        ).train()

    return Case(
        name="convnext",
        build=build,
        sample=lambda seed: _normal(seed, 4, 3, image, image),
        loss_fn=lambda logits: F.cross_entropy(logits, labels),
    )


ZOO: dict[str, Callable[[Size], Case]] = {
    factory.__name__: factory
    for factory in (
        gpt2,
        gpt2_bf16,
        gpt2_logits,
        bert,
        llama,
        t5,
        vit,
        resnet50,
        unet,
        transformer_encoder,
        mlp_frozen,
        mlp_bf16,
        many_outputs,
        lstm,
        mixture_of_experts,
        convnext,
    )
}
