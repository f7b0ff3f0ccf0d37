"""Functions under ``functools.lru_cache`` keep no stand-ins, and give up what they may not."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from graph_capture.reads import function_caches
from graph_capture.reads.function_caches import _Instances
from planner import CaptureError, optimize
from tests.graph_capture.odd import WIDTH, Three, mean_square, normal


@functools.lru_cache
def mask(size: int) -> Tensor:
    return torch.tril(torch.ones(size, size))


@functools.cache
def parts(size: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {"of it": (torch.arange(size) / size, torch.ones(()))}


@functools.lru_cache
def drawn(size: int) -> Tensor:
    return torch.randn(size)


class Masked(Three):
    def forward(self, x: Tensor) -> Tensor:
        scale, one = parts(WIDTH)["of it"]
        return self.a(x) @ mask(WIDTH) * scale + one + self.cached(2)

    @functools.lru_cache  # noqa: B019  # as people write it
    def cached(self, value: int) -> Tensor:
        return torch.full((), float(value))


class Table(NamedTuple):
    values: Tensor


class Slotted:
    __slots__ = ("nothing", "values")

    def __init__(self, values: Tensor) -> None:
        self.values = values


@functools.lru_cache
def wrapped(size: int, make: Callable[[Tensor], Any]) -> Any:
    return [make(torch.arange(size) + 1.0)]


class Wrapped(Three):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = wrapped(WIDTH, self.make)[0].values
        return self.a(x) * scale


@pytest.mark.parametrize(
    "make", [Table, Slotted, lambda values: types.SimpleNamespace(values=values)]
)
def test_what_a_cached_function_wraps(make: Callable[[Tensor], Any]) -> None:
    """In a named tuple, a slot, an attribute."""
    model = Wrapped(make).train()
    optimize(model, normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square)
    assert type(wrapped(WIDTH, make)[0].values) is Tensor
    assert type(model(normal(0, 16, WIDTH))) is Tensor


@functools.cache
def renewed(size: int) -> Tensor:
    return torch.arange(size) + 1.0


def cleared(size: int) -> Tensor:
    renewed.cache_clear()
    return renewed(size).diag()


def test_a_cache_that_forward_clears_and_fills_again() -> None:
    """It has computed as often as before the capture, and holds as much."""
    cleared(WIDTH)
    model = Keeps(cleared).train()
    optimize(model, normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square)
    assert type(renewed(WIDTH)) is Tensor


def test_functions_are_looked_for_where_there_may_be_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The heap is walked for a new function, and not for those that are known."""
    instances = _Instances()
    new = functools.lru_cache(lambda: 1)
    assert any(f is new for f in instances.found())
    walks: list[object] = []
    monkeypatch.setattr(gc, "get_referrers", lambda of: walks.append(of) or [])
    assert any(f is new for f in instances.found())
    assert not walks
    another = functools.lru_cache(lambda: 2)
    assert not instances.found()
    assert len(walks) == 1
    del another


class Drawn(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * drawn(WIDTH)


def by_default(size: int, *, kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006  # the cache
    if size not in kept:
        kept[size] = torch.tril(torch.ones(size, size))
    return kept[size]


of_partial = functools.partial(by_default, kept={})


def by_name(size: int) -> Tensor:
    if "OF_FILE" not in globals():
        globals()["OF_FILE"] = torch.tril(torch.ones(size, size))
    return globals()["OF_FILE"]


class Keeps(Three):
    def __init__(self, make: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.make(WIDTH)


@pytest.mark.parametrize("make", [by_default, of_partial, by_name])
def test_what_a_function_keeps_by_other_ways(make: Callable[[int], Tensor]) -> None:
    """In a default argument, in a partial function's, in its file by a name in quotes."""
    model = Keeps(make).train()
    optimize(model, normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square)
    assert type(make(WIDTH)) is Tensor
    assert type(model(normal(0, 16, WIDTH))) is Tensor


CACHES = (mask, parts, drawn, Masked.cached)


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    for function in CACHES:
        function.cache_clear()


def trained(model: nn.Module) -> dict[str, Tensor]:
    mean_square(model(normal(1, 16, WIDTH))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("before", [False, True], ids=["asked first by planning", "asked before"])
def test_constants_that_a_function_keeps_are_planned(before: bool) -> None:
    """Afterwards they are real tensors, or are made again."""
    torch.manual_seed(0)
    eager = Masked().train()
    torch.manual_seed(0)
    model = Masked().train()
    if before:
        trained(eager)
        eager.zero_grad()
    optimize(model, normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square).apply(model)
    kept = [mask(WIDTH), *parts(WIDTH)["of it"], model.cached(2)]
    assert all(type(each) is Tensor for each in kept)
    assert_same_tensors(trained(eager), trained(model))


def test_what_is_drawn_once_and_kept_is_refused() -> None:
    """A plan would draw it in each step; after a first step it is a constant."""
    torch.manual_seed(0)
    model = Drawn().train()
    with pytest.raises(CaptureError, match=r"drawn keeps a tensor.*lru_cache.*run the model once"):
        optimize(model, normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square)
    assert drawn.cache_info().currsize == 0
    expected = trained(model)
    optimize(model, normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square).apply(model)
    model.zero_grad()
    assert_same_tensors(expected, trained(model))


def test_caches_of_this_package_are_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold the names of thousands of files, and each capture asks them."""
    looked: list[str] = []

    def looks(function: Any, own: Callable[[Any], Any] = function_caches._looks) -> Any:
        looked.append(function.__module__)
        return own(function)

    monkeypatch.setattr(function_caches, "_looks", looks)
    optimize(Masked(), normal(0, 16, WIDTH), budget_gb=1, loss_fn=mean_square)
    assert __name__ in looked
    assert not [name for name in looked if name.startswith("graph_capture.")]
