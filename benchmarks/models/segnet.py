"""SegNet: VGG-16's convolutions down, the same up, where pooling's indices say.

References
----------
Badrinarayanan, Kendall and Cipolla 2015, *SegNet: A Deep Convolutional
Encoder-Decoder Architecture for Image Segmentation*, arXiv:1511.00561, figure 2.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .subject import Size, Subject, WithLoss, segmented
from .vgg import CONVOLUTIONS, stage_widths

SOURCE = "Badrinarayanan et al. 2015, arXiv:1511.00561"


class SegNet(nn.Module):
    """The segmenter. Images' sides must be multiples of 32.

    Parameters
    ----------
    classes
        Of each pixel.
    width
        Channels of the first stage, 64 in the paper.
    """

    def __init__(self, *, classes: int = 11, width: int = 64) -> None:
        super().__init__()
        counts, widths = CONVOLUTIONS[16], stage_widths(width)
        self.down = nn.ModuleList(
            _stage([inputs, *[out] * count])
            for inputs, out, count in zip([3, *widths[:-1]], widths, counts, strict=True)
        )
        # The decoder: each stage ends with the channels of the one before it.
        ends = (width, *widths[:-1])
        self.up = nn.ModuleList(
            _stage([inputs] * count + [out])
            for inputs, out, count in zip(widths[::-1], ends[::-1], counts[::-1], strict=True)
        )
        self.head = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        indices: list[Tensor] = []
        for stage in self.down:
            x, index = F.max_pool2d(stage(x), 2, return_indices=True)
            indices.append(index)
        for stage in self.up:
            x = stage(F.max_unpool2d(x, indices.pop(), 2))
        out: Tensor = self.head(x)
        return out


def _stage(channels: list[int]) -> nn.Sequential:
    """Convolutions with batch norm and ReLU, from each number of channels to the next."""
    layers: list[nn.Module] = []
    for inputs, out in pairwise(channels):
        layers += [
            nn.Conv2d(inputs, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def segnet(size: Size) -> Subject:
    """At ``paper`` the images that Checkmate segments."""
    width, classes, batch, image = {
        "tiny": (4, 5, 2, (32, 32)),
        "record": (16, 11, 4, (96, 96)),
        "paper": (64, 11, 8, (416, 608)),
    }[size]
    return Subject(
        name="segnet",
        size=size,
        description=f"width {width}, batch {batch} x {image[0]} x {image[1]}",
        source=SOURCE,
        make=lambda: WithLoss(SegNet(classes=classes, width=width)),
        tensors=segmented(batch, image, classes),
    )
