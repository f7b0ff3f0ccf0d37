"""A model of the literature: a module, the call that trains it, and a description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = Literal["tiny", "record", "paper"]
"""``tiny`` is for tests. A step of ``record`` takes some tenths of a second on one CPU core, and
some 100 MB. ``paper`` is the published shape, which is only planned, on ``meta``."""

SIZES: tuple[Size, ...] = ("tiny", "record", "paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A tensor of a sample. Its first dimension is the batch.

    Parameters
    ----------
    shape
        Of the tensor.
    below
        Draw whole numbers from 0 up to it; ``None`` for normal floats.
    """

    shape: tuple[int, ...]
    below: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model at one size.

    Parameters
    ----------
    name, size
        As in the registry.
    description
        Depth, width, batch and so on, for a report.
    source
        The paper that the structure comes from.
    make
        Builds the module on the current ``torch.device``; see :meth:`build`.
    tensors
        Keyword arguments of a call, targets included; see :meth:`sample`.
    loss_fn
        Computes the scalar loss from the output. ``None`` if the output is or has the
        loss, as for all models here.
    """

    name: str
    size: Size
    description: str
    source: str
    make: Callable[[], nn.Module]
    tensors: Mapping[str, Drawn]
    loss_fn: Callable[[Any], Tensor] | None = None

    @property
    def label(self) -> str:
        """Name and size, for progress and errors."""
        return f"{self.name}, {self.size}"

    @property
    def batch(self) -> int:
        """The default batch size of a sample."""
        return next(iter(self.tensors.values())).shape[0]

    def build(self, device: str = "cpu", *, seed: int = 0) -> nn.Module:
        """The module in training mode on a device; the global generator stays as it was."""
        with torch.random.fork_rng(devices=()), torch.device(device):
            torch.manual_seed(seed)
            return self.make().train()

    def sample(
        self, seed: int = 0, *, device: str = "cpu", batch: int | None = None
    ) -> dict[str, Tensor]:
        """Keyword arguments of a call; on ``meta`` only shapes. The seed decides the values."""
        generator = torch.Generator().manual_seed(seed)
        call: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            shape = (batch or tensor.shape[0], *tensor.shape[1:])
            if device == "meta":
                dtype = torch.float32 if tensor.below is None else torch.long
                call[name] = torch.empty(shape, dtype=dtype, device="meta")
            elif tensor.below is None:
                call[name] = torch.randn(shape, generator=generator).to(device)
            else:
                drawn = torch.randint(0, tensor.below, shape, generator=generator)
                call[name] = drawn.to(device)
        return call


class WithLoss(nn.Module):
    """A network that is called with images and labels and returns its cross entropy.

    Labels are one class per image, or one class per pixel.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images), labels)


def classified(batch: int, image: int, classes: int, channels: int = 3) -> dict[str, Drawn]:
    """Images with one class each."""
    return {
        "images": Drawn(shape=(batch, channels, image, image)),
        "labels": Drawn(shape=(batch,), below=classes),
    }


def segmented(batch: int, image: tuple[int, int], classes: int) -> dict[str, Drawn]:
    """Images with a class for each pixel."""
    return {
        "images": Drawn(shape=(batch, 3, *image)),
        "labels": Drawn(shape=(batch, *image), below=classes),
    }
