"""The models by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .fcn import fcn8
from .mobilenet import mobilenet, mobilenet_v2
from .resnet import resnet50
from .segnet import segnet
from .subject import Size, Subject
from .transformer import bert, gpt2, llama, t5, vit
from .unet import unet
from .vgg import vgg16, vgg19

SUBJECTS: Mapping[str, Callable[[Size], Subject]] = MappingProxyType(
    {
        factory.__name__: factory
        for factory in (
            bert,
            gpt2,
            llama,
            t5,
            vit,
            resnet50,
            unet,
            vgg16,
            vgg19,
            fcn8,
            segnet,
            mobilenet,
            mobilenet_v2,
        )
    }
)
"""Transformers first, then networks of convolutions."""
