"""Small models that read what real ones read: attributes, lists, globals, a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .subject import seeded

WIDTH = 32
BATCH = 8
GLOBAL_SCALE = 1.0
"""Read by :class:`Perceptron`; a loop may change it."""


class Perceptron(nn.Module):
    """Dropout, batch norm, and every kind of plain attribute."""

    class_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 64), nn.Linear(64, 64)
        self.norm, self.dropout = nn.BatchNorm1d(64), nn.Dropout(0.1)
        self.last = nn.Linear(64, WIDTH)
        self.temperature = 1.0
        self.activation: Callable[[Tensor], Tensor] = F.gelu
        self.factors = [1.0, 0.5]
        self.options = {"bias": 0.25}
        self.offset = torch.full((64,), 0.1)  # not a buffer, as in many models
        self.skip = True
        self.register_buffer("shift", torch.zeros(64))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.activation(self.norm(self.first(x)))
        y = self.dropout(self.second(h)) * self.factors[0] + self.offset + self.shift
        if self.skip:
            y = y + h * self.factors[1]
        y = self.activation(y / self.temperature) + self.options["bias"]
        return self.last(y) * (self.class_scale * GLOBAL_SCALE * scale)


class Convolutions(nn.Module):
    """Two convolutions, batch norm, dropout of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.SiLU(),
        )
        self.head = nn.Linear(16, 5)
        self.temperature = 1.0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.features(x).mean((2, 3))) * (scale / self.temperature)


@dataclass
class TwoOutputs:
    """What :class:`TwoHeads` returns."""

    main: Tensor
    side: Tensor


torch.utils._pytree.register_dataclass(TwoOutputs, serialized_type_name="TwoOutputs")


class TwoHeads(nn.Module):
    """One trunk, two outputs; the loss uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64)
        )
        self.main, self.side = nn.Linear(64, 4), nn.Linear(64, 4)
        self.temperature = 1.0

    def forward(self, x: Tensor, scale: float = 1.0) -> TwoOutputs:
        h = self.trunk(x).tanh() * scale
        return TwoOutputs(self.main(h) / self.temperature, self.side(h.detach() + 0.5 * h))


@dataclass
class Settings:
    """A configuration object with a nested part."""

    scale: float = 1.0
    rate: float = 0.1
    clip: bool = False
    inner: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(power=1.0))


class Configured(nn.Module):
    """Layers that read a shared configuration object."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.temperature = 1.0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            h = F.dropout(F.silu(layer(self.norm(x))), self.config.rate, self.training)
            x = x + h * self.config.scale * self.config.inner.power
        if self.config.clip:
            x = x.clamp(-1, 1)
        return x * scale / self.temperature


def tiny_gpt2() -> nn.Module:
    """GPT-2 of two narrow layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopModel:
    """A model of the sweep.

    Parameters
    ----------
    make
        Builds it.
    sample
        Maps a seed and a batch size to keyword arguments.
    loss
        Computes the loss of an output.
    hooked, dropout, norm
        Paths of the submodules for hooks and attributes; ``""`` for none.
    """

    make: Callable[[], nn.Module]
    sample: Callable[[int, int], dict[str, Any]]
    loss: Callable[[Any], Tensor] | None
    hooked: str
    dropout: str = ""
    norm: str = ""


def _rows(seed: int, batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, WIDTH, generator=seeded(seed))}


def _pictures(seed: int, batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, 12, 12, generator=seeded(seed))}


def _tokens(seed: int, batch: int) -> dict[str, Any]:
    ids = torch.randint(3, 99, (batch, 16), generator=seeded(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def _square(output: Tensor) -> Tensor:
    return output.pow(2).mean()


def _main_square(output: TwoOutputs) -> Tensor:
    return output.main.pow(2).mean()


MODELS: dict[str, LoopModel] = {
    "perceptron": LoopModel(
        make=Perceptron, sample=_rows, loss=_square, hooked="second", dropout="dropout", norm="norm"
    ),
    "convolutions": LoopModel(
        make=Convolutions,
        sample=_pictures,
        loss=_square,
        hooked="features.4",
        dropout="features.3",
        norm="features.1",
    ),
    "two heads": LoopModel(
        make=TwoHeads, sample=_rows, loss=_main_square, hooked="trunk.3", dropout="trunk.2"
    ),
    "configured": LoopModel(
        make=Configured, sample=_rows, loss=_square, hooked="layers.1", norm="norm"
    ),
    "gpt2": LoopModel(
        make=tiny_gpt2,
        sample=_tokens,
        loss=None,
        hooked="transformer.h.1.mlp",
        dropout="transformer.drop",
        norm="transformer.ln_f",
    ),
}
"""By name."""
