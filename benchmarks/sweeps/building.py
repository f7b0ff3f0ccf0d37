"""How subjects of other libraries are put together."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .subject import NotInstalled, Subject, mean_square, seeded

BATCH = 2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def whole(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=seeded(seed))


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(f"{name} is not installed ({error})") from error


def made_of(
    library: str, path: str, sample: Callable[[int], Any], *positional: Any, **options: Any
) -> Callable[[], Subject]:
    def find() -> Subject:
        module = imported(library)
        model_class = module
        for part in path.split("."):
            model_class = getattr(model_class, part)

        def make() -> nn.Module:
            return model_class(*positional, **options).train()

        return Subject(make=make, sample=sample, loss_fn=mean_square)

    return find
