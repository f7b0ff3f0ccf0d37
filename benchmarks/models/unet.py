"""U-Net: a contracting and an expanding path, joined at each level.

References
----------
Ronneberger, Fischer and Brox 2015, *U-Net: Convolutional Networks for Biomedical
Image Segmentation*, arXiv:1505.04597, figure 1.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .subject import Size, Subject, WithLoss, segmented

SOURCE = "Ronneberger et al. 2015, arXiv:1505.04597"


class TwoConvolutions(nn.Sequential):
    """A step of either path: two 3 x 3 convolutions with ReLU.

    They have names instead of numbers, because users recompute the step as a whole.
    """

    def __init__(self, channels: int, out: int, *, batch_norm: bool, padding: int) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, inputs in enumerate((channels, out), start=1):
            layers[f"conv{i}"] = nn.Conv2d(inputs, out, 3, padding=padding, bias=not batch_norm)
            if batch_norm:
                layers[f"norm{i}"] = nn.BatchNorm2d(out)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
        super().__init__(layers)


class UNet(nn.Module):
    """The segmenter.

    Parameters
    ----------
    width
        Channels of the first level, 64 in the paper; each level has twice as many.
    levels
        5 in the paper.
    channels, classes
        Of the images, and of the output.
    batch_norm
        After each convolution; the paper has none.
    padded
        Whether convolutions keep the size. In the paper they do not (572 x 572 pixels
        give 388 x 388), and skip connections are cropped. If padded, the image's sides
        must be multiples of ``2 ** (levels - 1)``.
    dropout
        At the end of the contracting path.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        levels: int = 5,
        channels: int = 3,
        classes: int = 2,
        batch_norm: bool = False,
        padded: bool = True,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]

        def step(inputs: int, out: int) -> TwoConvolutions:
            return TwoConvolutions(inputs, out, batch_norm=batch_norm, padding=int(padded))

        self.down = nn.ModuleList(
            step(inputs, out) for inputs, out in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * out, out, 2, stride=2) for out in widths[-2::-1]
        )
        self.merge = nn.ModuleList(step(2 * out, out) for out in widths[-2::-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, step in enumerate(self.down):
            x = step(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, merge in zip(self.up, self.merge, strict=True):
            x = up(x)
            x = merge(torch.cat([cropped(skips.pop(), x), x], dim=1))
        out: Tensor = self.head(x)
        return out


def cropped(skip: Tensor, like: Tensor) -> Tensor:
    """The middle of ``skip``, as large as ``like``."""
    top, left = ((s - t) // 2 for s, t in zip(skip.shape[2:], like.shape[2:], strict=True))
    return skip[:, :, top : top + like.shape[2], left : left + like.shape[3]]


def unet(size: Size) -> Subject:
    """Padded; at ``paper`` the images and the batch of Checkmate's figure 5.

    The two smaller sizes have batch norm, which is what people train today.
    """
    width, levels, batch, image = {
        "tiny": (4, 3, 2, (16, 16)),
        "record": (16, 4, 4, (128, 128)),
        "paper": (64, 5, 32, (416, 608)),
    }[size]
    batch_norm = size != "paper"
    norm = "with batch norm" if batch_norm else "without batch norm"
    return Subject(
        name="unet",
        size=size,
        description=f"{levels} levels, width {width}, {norm}, batch {batch} x {image[0]} x "
        f"{image[1]}",
        source=SOURCE,
        make=lambda: WithLoss(UNet(width=width, levels=levels, batch_norm=batch_norm)),
        tensors=segmented(batch, image, 2),
    )
