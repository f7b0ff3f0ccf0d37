"""MobileNet, version 1 (the one of Checkmate's experiments) and version 2.

References
----------
Howard et al. 2017, *MobileNets*, arXiv:1704.04861, table 1; Sandler et al. 2018,
*MobileNetV2: Inverted Residuals and Linear Bottlenecks*, arXiv:1801.04381, table 2.
"""

from __future__ import annotations

from torch import Tensor, nn

from .subject import Size, Subject, WithLoss, classified

# (channels, stride) of each depthwise separable convolution.
VERSION_1 = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
# (expansion, channels, repeats, stride of the first) of each row of inverted residuals.
VERSION_2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def scaled(channels: int, width: float) -> int:
    """Channels times the width multiplier, as a multiple of 8, and at most a tenth less.

    Without the last condition narrow layers would lose much. The released code of both
    papers rounds this way.
    """
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


class ConvNorm(nn.Sequential):
    """A convolution without bias, batch norm, and ReLU6 if ``active``."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(
                channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out),
        ]
        if active:
            layers.append(nn.ReLU6(inplace=True))
        super().__init__(*layers)


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions.

    Parameters
    ----------
    classes
        Of the output.
    width
        The paper's width multiplier.
    """

    def __init__(self, *, classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        layers: list[nn.Module] = [ConvNorm(3, channels, 3, stride=2)]
        for base, stride in VERSION_1:
            out = scaled(base, width)
            layers.append(
                nn.Sequential(
                    ConvNorm(channels, channels, 3, stride=stride, groups=channels),
                    ConvNorm(channels, out, 1),
                )
            )
            channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return out


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow without activation; added where shapes allow."""

    def __init__(self, channels: int, out: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [ConvNorm(channels, inner, 1)]
        layers += [
            ConvNorm(inner, inner, 3, stride=stride, groups=inner),
            ConvNorm(inner, out, 1, active=False),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Inverted residuals.

    Parameters
    ----------
    classes
        Of the output.
    width
        The paper's width multiplier; the last convolution is never narrower than 1,280.
    """

    def __init__(self, *, classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        layers: list[nn.Module] = [ConvNorm(3, channels, 3, stride=2)]
        for expansion, base, repeats, stride in VERSION_2:
            out = scaled(base, width)
            for i in range(repeats):
                layers.append(
                    InvertedResidual(
                        channels, out, stride=stride if i == 0 else 1, expansion=expansion
                    )
                )
                channels = out
        last = scaled(1280, max(1.0, width))
        layers.append(ConvNorm(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.pool(self.features(images)).flatten(1))
        return out


def _mobilenet(version: int, size: Size) -> Subject:
    width, classes, batch, image = {
        "tiny": (0.25, 10, 2, 32),
        "record": (0.5, 100, 8, 128),
        "paper": (1.0, 1000, 512, 224),
    }[size]
    network, source = {
        1: (MobileNetV1, "Howard et al. 2017, arXiv:1704.04861"),
        2: (MobileNetV2, "Sandler et al. 2018, arXiv:1801.04381"),
    }[version]
    return Subject(
        name="mobilenet" if version == 1 else "mobilenet_v2",
        size=size,
        description=f"width multiplier {width:g}, batch {batch} x {image} x {image}",
        source=source,
        make=lambda: WithLoss(network(classes=classes, width=width)),
        tensors=classified(batch, image, classes),
    )


def mobilenet(size: Size) -> Subject:
    """Version 1; at ``paper`` the batch of Checkmate's figure 5."""
    return _mobilenet(1, size)


def mobilenet_v2(size: Size) -> Subject:
    """Version 2."""
    return _mobilenet(2, size)
