"""Methods that somebody replaces in a class are missed, by whatever way Python calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..odd import Three
from .test_reads import reads_of


class Helper:
    """Used by operators and statements, which read no attribute."""

    def __len__(self) -> int:
        return 2

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, at: int) -> float:
        return 2.0

    def __contains__(self, item: int) -> bool:
        return True

    def __enter__(self) -> float:
        return 2.0

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, x: Tensor) -> Tensor:
        return x * 2

    def scaled(self, x: Tensor) -> Tensor:
        return x * 2


@dataclass
class Made:
    """Made by forward itself."""

    by: float = 2.0

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.by


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Layers(nn.Module):
    """Says itself how many layers it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, at: int) -> nn.Module:
        return self.layers[at]

    def forward(self, x: Tensor) -> Tensor:
        for at in range(len(self)):
            x = self[at](x)
        return x


class Uses(Three):
    def prepare(self) -> None:
        self.helper, self.layers = Helper(), Layers()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        made = Helper()
        h = made.scaled(h) * len(made) if made else h
        h = h * self.helper[1] if 3 in self.helper else h
        with self.helper as factor:
            h = self.helper(h) * factor
        return self.c(
            self.layers(Doubled.apply(Made().scaled(h))[:, :8]).repeat(1, h.shape[1] // 8)
        )


CHANGES: dict[str, tuple[type, str, Any]] = {
    "'Helper.__len__'": (Helper, "__len__", lambda self: 3),
    "'Helper.__bool__'": (Helper, "__bool__", lambda self: False),
    "'Helper.__getitem__'": (Helper, "__getitem__", lambda self, at: 3.0),
    "'Helper.__contains__'": (Helper, "__contains__", lambda self, item: False),
    "'Helper.__enter__'": (Helper, "__enter__", lambda self: 3.0),
    "'Helper.__call__'": (Helper, "__call__", lambda self, x: x * 3),
    "'Helper.__getattribute__'": (Helper, "__getattribute__", object.__getattribute__),
    "'Helper.scaled'": (Helper, "scaled", lambda self, x: x * 3),
    "'Made.scaled'": (Made, "scaled", lambda self, x: x * 3),
    "defaults": (Made.__init__, "__defaults__", (3.0,)),  # type: ignore[dict-item, misc]
    "'Doubled.forward'": (Doubled, "forward", staticmethod(lambda ctx, x: x * 3)),
    "'Doubled.backward'": (Doubled, "backward", staticmethod(lambda ctx, g: g * 3)),
    "'Layers.__len__'": (Layers, "__len__", lambda self: 2),
    "'Layers.__getitem__'": (Layers, "__getitem__", lambda self, at: self.layers[1]),
    "'Layers.__call__'": (Layers, "__call__", lambda self, x: x),
}


def test_a_replaced_method_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Special methods, those of objects that forward makes, and those that autograd calls."""
    reads = reads_of(Uses().train())
    for _ in range(2):  # before the quick comparison is made, and by it
        for name, (holder, attribute, value) in CHANGES.items():
            with monkeypatch.context() as patch:
                patch.setattr(holder, attribute, value, raising=False)
                assert name in (reads.difference() or "")
        assert reads.difference() is None


def test_methods_that_never_ran_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no part of the step."""
    reads = reads_of(Uses().train())
    unused: Callable[..., Any] = lambda self, x: None  # noqa: E731
    monkeypatch.setattr(Helper, "unused", unused, raising=False)
    assert reads.difference() is None
