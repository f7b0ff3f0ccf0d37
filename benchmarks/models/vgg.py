"""VGG-16 and VGG-19: stages of 3 x 3 convolutions, then three dense layers with dropout.

References
----------
Simonyan and Zisserman 2014, *Very Deep Convolutional Networks for Large-Scale
Image Recognition*, arXiv:1409.1556, table 1, columns D and E.
"""

from __future__ import annotations

from torch import Tensor, nn

from .subject import Size, Subject, WithLoss, classified

SOURCE = "Simonyan and Zisserman 2014, arXiv:1409.1556"

CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each stage, by the number of layers with weights."""


def stage_widths(width: int) -> tuple[int, ...]:
    """Channels of the five stages; ``width`` is that of the first, 64 in the paper."""
    return (width, 2 * width, 4 * width, 8 * width, 8 * width)


class VGG(nn.Module):
    """The classifier.

    Parameters
    ----------
    layers
        16 or 19.
    classes
        Of the output.
    width
        Channels of the first stage, 64 in the paper.
    hidden
        Features of the dense layers.
    grid
        Before the dense layers, images of any size are pooled to ``grid`` x ``grid``.
    """

    def __init__(
        self,
        layers: int = 16,
        *,
        classes: int = 1000,
        width: int = 64,
        hidden: int = 4096,
        grid: int = 7,
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = 3
        for count, out in zip(CONVOLUTIONS[layers], stage_widths(width), strict=True):
            for _ in range(count):
                features += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
                channels = out
            features.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Linear(channels * grid * grid, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return out


def _vgg(layers: int, size: Size) -> Subject:
    width, hidden, grid, classes, batch, image = {
        "tiny": (4, 16, 1, 10, 2, 32),
        "record": (16, 256, 2, 100, 16, 96),
        "paper": (64, 4096, 7, 1000, 256 if layers == 16 else 64, 224),
    }[size]
    return Subject(
        name=f"vgg{layers}",
        size=size,
        description=f"width {width}, dense {hidden}, batch {batch} x {image} x {image}",
        source=SOURCE,
        make=lambda: WithLoss(VGG(layers, classes=classes, width=width, hidden=hidden, grid=grid)),
        tensors=classified(batch, image, classes),
    )


def vgg16(size: Size) -> Subject:
    """13 convolutions; at ``paper`` the batch of Checkmate's figure 5."""
    return _vgg(16, size)


def vgg19(size: Size) -> Subject:
    """16 convolutions."""
    return _vgg(19, size)
