"""ResNet-50, as Transformers builds it: bottlenecks of three convolutions with batch norm.

References
----------
He et al. 2015, *Deep Residual Learning for Image Recognition*, arXiv:1512.03385,
table 1. Transformers strides in the 3 x 3 convolution, as most releases do today.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .subject import Drawn, Size, Subject

SOURCE = "He et al. 2015, arXiv:1512.03385"


def make_resnet(*, depths: tuple[int, ...], width: int, classes: int) -> nn.Module:
    """A classifier; ``width`` is that of the first convolution, 64 in the paper."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        depths=list(depths),
        embedding_size=width,
        hidden_sizes=[width * 4 * 2**stage for stage in range(len(depths))],
        num_labels=classes,
    )
    model: Any = ResNetForImageClassification(config)
    return model  # type: ignore[no-any-return]


def resnet50(size: Size) -> Subject:
    """16 bottlenecks in four stages; four in two when tiny. At ``record`` of half the width."""
    depths, width, classes, batch, image = {
        "tiny": ((2, 2), 8, 10, 2, 32),
        "record": ((3, 4, 6, 3), 32, 100, 8, 96),
        "paper": ((3, 4, 6, 3), 64, 1000, 256, 224),
    }[size]
    return Subject(
        name="resnet50",
        size=size,
        description=f"{sum(depths)} bottlenecks, width {width}, batch {batch} x {image} x {image}",
        source=SOURCE,
        make=lambda: make_resnet(depths=depths, width=width, classes=classes),
        tensors={
            "pixel_values": Drawn(shape=(batch, 3, image, image)),
            "labels": Drawn(shape=(batch,), below=classes),
        },
    )
