"""FCN-8s on VGG-16: a classifier made convolutional, with scores of three resolutions added up.

References
----------
Long, Shelhamer and Darrell 2014, *Fully Convolutional Networks for Semantic
Segmentation*, arXiv:1411.4038, figure 3. The paper pads images by 100 pixels and
crops the output; here convolutions and transposed convolutions are padded so that
sizes fit, and images' sides must be multiples of 32.
"""

from __future__ import annotations

from torch import Tensor, nn

from .subject import Size, Subject, WithLoss, segmented
from .vgg import VGG, stage_widths

SOURCE = "Long et al. 2014, arXiv:1411.4038"


class FCN8(nn.Module):
    """The segmenter.

    Parameters
    ----------
    classes
        Of each pixel, 21 in the paper.
    width
        Channels of the first stage, 64 in the paper.
    hidden
        Channels of what were the dense layers, 4,096 in the paper.
    """

    def __init__(self, *, classes: int = 21, width: int = 64, hidden: int = 4096) -> None:
        super().__init__()
        vgg = VGG(16, classes=1, width=width, hidden=1, grid=1)
        self.stages = nn.ModuleList(_stages(vgg.features))
        widths = stage_widths(width)
        self.dense = nn.Sequential(
            nn.Conv2d(widths[4], hidden, 7, padding=3),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
        )
        self.score = nn.Conv2d(hidden, classes, 1)
        self.score_fourth = nn.Conv2d(widths[3], classes, 1)
        self.score_third = nn.Conv2d(widths[2], classes, 1)
        self.up = nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1, bias=False)
        self.up_fourth = nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1, bias=False)
        self.up_third = nn.ConvTranspose2d(classes, classes, 16, stride=8, padding=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            pooled.append(x)
        scores = self.up(self.score(self.dense(x))) + self.score_fourth(pooled[3])
        scores = self.up_fourth(scores) + self.score_third(pooled[2])
        out: Tensor = self.up_third(scores)
        return out


def _stages(features: nn.Sequential) -> list[nn.Sequential]:
    """VGG's features, cut behind each pooling."""
    stages: list[nn.Sequential] = []
    layers: list[nn.Module] = []
    for layer in features:
        layers.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            stages.append(nn.Sequential(*layers))
            layers = []
    return stages


def fcn8(size: Size) -> Subject:
    """At ``paper`` the images that Checkmate segments."""
    width, hidden, classes, batch, image = {
        "tiny": (4, 16, 5, 2, (32, 32)),
        "record": (16, 256, 21, 4, (128, 128)),
        "paper": (64, 4096, 21, 8, (416, 608)),
    }[size]
    return Subject(
        name="fcn8",
        size=size,
        description=f"width {width}, dense {hidden}, batch {batch} x {image[0]} x {image[1]}",
        source=SOURCE,
        make=lambda: WithLoss(FCN8(classes=classes, width=width, hidden=hidden)),
        tensors=segmented(batch, image, classes),
    )
