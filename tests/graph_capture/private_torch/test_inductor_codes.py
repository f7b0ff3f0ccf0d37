"""Inductor's code is generated once for one graph, and again for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graph_capture.private_torch.compiler import inductor_config
from graph_capture.private_torch.inductor import GeneratedCode, generate_code
from graph_capture.private_torch.inductor_codes import MOST_KEPT, generating_once
from graph_capture.private_torch.inductor_fusion import KernelPlace, put

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _chain(x: Tensor, y: Tensor) -> tuple[Tensor]:
    return ((x @ y).relu().exp() + x,)


class _All:
    """Rules that join everything."""

    def for_one_lowering(self) -> Callable[..., bool]:
        return lambda runs, num_bytes: True


def _code(
    function: Callable[..., tuple[Tensor]] = _chain, size: int = 4, **options: Any
) -> GeneratedCode:
    place = options.pop("place", None)
    tracing_mode = options.pop("tracing_mode", "fake")
    x, y = torch.ones(size, size), torch.ones(size, size)
    module = make_fx(function, tracing_mode=tracing_mode)(x, y)
    if place is not None:
        for node in module.graph.nodes:
            put(node, place)
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    return generate_code(module, inputs, **{"is_backward": False, "num_visible": 1, **options})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Lowerings whose code Inductor itself generated, while codes are kept."""
    from torch._inductor.graph import GraphLowering

    found: list[Any] = []
    codegen = GraphLowering.codegen

    def counted(lowering: Any) -> Any:
        found.append(lowering)
        return codegen(lowering)

    monkeypatch.setattr(GraphLowering, "codegen", counted)
    with generating_once():
        yield found


def test_a_graph_is_generated_once(calls: list[Any]) -> None:
    """The second lowering gets the same text, and its scheduler names no collectives."""
    first, second = _code(), _code()
    assert len(calls) == 1
    assert first.text == second.text


def test_what_the_code_depends_on_makes_another(calls: list[Any]) -> None:
    """Sizes, calls, rules, donated inputs of backward, settings."""
    place = KernelPlace(1, True, _All())
    variants: list[Callable[[], GeneratedCode]] = [
        _code,
        lambda: _code(size=5),
        lambda: _code(lambda x, y: ((x @ y).relu().sin() + x,)),
        lambda: _code(place=place),
        lambda: _code(place=KernelPlace(2, True, place.rules)),
        lambda: _code(is_backward=True),
        lambda: _code(is_backward=True, donated=[0]),
        lambda: _code(num_visible=0),
    ]
    for number, variant in enumerate(variants, 1):
        variant()
        assert len(calls) == number
    with inductor_config().patch(max_fusion_size=1):
        _code()
    assert len(calls) == len(variants) + 1


def test_symbolic_sizes_are_lowered_each_time(calls: list[Any]) -> None:
    """Their code leaves guards behind."""
    _code(tracing_mode="symbolic")
    _code(tracing_mode="symbolic")
    assert len(calls) == 2


def _with_constant(number: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x * torch.tensor([number, 1.0, 2.0, 3.0])).exp()


def _with_branch(number: float) -> Callable[[Tensor], Tensor]:
    def first(x: Tensor) -> Tensor:
        return x * number

    return lambda x: torch.cond(x.sum() > 0, first, torch.sin, (x,)).exp()


@pytest.mark.slow
@pytest.mark.parametrize("made_with", [_with_constant, _with_branch])
def test_what_nodes_do_not_show_is_generated_each_time(
    made_with: Callable[[float], Callable[[Tensor], Tensor]], calls: list[Any]
) -> None:
    """Numbers of constants and graphs of branches, which become part of the code."""
    x = torch.ones(4)
    with inductor_config().patch(fx_graph_cache=False):
        for number in (2.0, 3.0, 2.0):
            torch.compiler.reset()
            step, before = made_with(number), len(calls)
            assert torch.allclose(torch.compile(step)(x), step(x))
            assert len(calls) > before


def test_few_codes_are_kept(calls: list[Any]) -> None:
    """Those of the last graphs."""
    for size in range(2, MOST_KEPT + 3):
        _code(size=size)
    before = len(calls)
    _code(size=MOST_KEPT + 2)
    assert len(calls) == before
    _code(size=2)
    assert len(calls) == before + 1


def test_nothing_is_kept_afterwards() -> None:
    """Inductor's own function is back."""
    from torch._inductor.graph import GraphLowering

    codegen = GraphLowering.codegen
    with generating_once():
        assert GraphLowering.codegen is not codegen
    assert GraphLowering.codegen is codegen
