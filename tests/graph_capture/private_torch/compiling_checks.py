"""What we rely on of what ``torch.compile`` partitions and compiles with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from graph_capture.private_torch import (
    compiled_calls,
    compiler,
    fake_tensors,
    inductor,
    inductor_codes,
    inductor_fusion,
    joined_kernels,
    replacing,
)


def _functional() -> bool:
    """Writes become results, and what is written to an input is copied back at the end."""

    def write(x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ops.aten.add_.Tensor(x, 1).sum()]

    with fake_tensors.FakeTensorMode():
        graph = inductor.functional_graph(write, [torch.empty(3)]).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    return targets == [aten.add.Tensor, aten.sum.default, aten.copy_.default]


def _kernels_do_nothing() -> bool:
    from torch._inductor.async_compile import AsyncCompile

    with inductor.kernels_do_nothing():
        return AsyncCompile.cpp_pybinding(["float*"], "not C++")(torch.ones(1)) is None


def _partitions() -> bool:
    config, partitioner = compiler.inductor_config(), inductor.custom_partitioner(print, "name")
    with inductor.partitioning_by(partitioner):
        inside = config.custom_partitioner_fn
    return inside is partitioner and config.custom_partitioner_fn is None


def _compiles_by() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's own
        from torch._inductor import compile_fx

    theirs, asked = compile_fx.compile_fx, []
    with inductor.compiling_by(lambda *args, **_: asked.extend([*args, compile_fx.compile_fx])):
        compile_fx.compile_fx("graph", [])  # type: ignore[arg-type]
    return asked == [theirs, "graph", [], theirs] and compile_fx.compile_fx is theirs


def _tells_settings() -> bool:
    config, before = compiler.inductor_config(), compiler.inductor_settings()
    with config.patch(max_fusion_size=7):
        inside = compiler.inductor_settings()
    with config.patch(custom_partitioner_fn=inductor.custom_partitioner(print, "name")):
        same = compiler.inductor_settings()
    return inside != before == same == compiler.inductor_settings()


def _tells_settings_of_partitions() -> bool:
    config, before = compiler.functorch_config(), compiler.functorch_settings()
    with config.patch(aggressive_recomputation=not config.aggressive_recomputation):
        inside = compiler.functorch_settings()
    with config.patch(activation_memory_budget=0.5):
        same = compiler.functorch_settings()
    return inside != before == same and " at 0x" not in before


def _keeps_codes_in_a_folder() -> bool:
    config, folder = compiler.inductor_config(), compiler.inductor_cache_folder
    with config.patch(fx_graph_cache=True, force_disable_caches=False):
        place = folder()
    with config.patch(fx_graph_cache=False), config.patch(force_disable_caches=True):
        nowhere = folder()
    return place is not None and Path(place).is_dir() and nowhere is None


def _fuses_as_told() -> bool:
    from torch._inductor import graph
    from torch._inductor.virtualized import V

    before, run_node = V.choices, graph.GraphLowering.run_node
    with inductor_fusion.fusing_as_told():
        told = V.choices is not before and graph.GraphLowering.run_node is not run_node
    return told and V.choices is before and graph.GraphLowering.run_node is run_node


def _differentiates_inside() -> bool:
    """Dynamo's graph of a step in functional style names it, and another does not."""
    found: list[bool] = []

    def backend(module: Any, _inputs: Any) -> Any:
        found.append(compiler.differentiates_inside(module))
        return module

    def loss(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum()

    for call in (torch.func.grad(loss), loss):
        torch.compile(call, backend=backend)(torch.ones(3))
    return found == [True, False]


def _generates_once() -> bool:
    from torch._inductor.graph import GraphLowering

    before = GraphLowering.codegen
    with inductor_codes.generating_once():
        inside = GraphLowering.codegen
    return inside is not before and GraphLowering.codegen is before


def _compiles_together() -> bool:
    from torch._inductor.async_compile import AsyncCompile

    before = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    with joined_kernels.compiling_together():
        inside = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    after = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    return all(x is not y for x, y in zip(inside, before, strict=True)) and after == before


class _Never:
    """Rules that join nothing."""

    def for_one_lowering(self) -> inductor_fusion.JoinOnce:
        return lambda runs, num_bytes: False


PLACED = inductor_fusion.KernelPlace(1, False, _Never())


def _puts() -> bool:
    node = torch.fx.Graph().placeholder("x")
    inductor_fusion.put(node, PLACED)
    inductor_fusion.put_freed(node)
    other = torch.fx.Graph().placeholder("x")
    return (
        len(node.meta) == 2
        and PLACED in node.meta.values()
        and inductor_fusion.told(node) == (1, False, True, hash(PLACED.rules))
        and inductor_fusion.told(other) is None
    )


def _calls_are_entered(*, named: bool) -> bool:
    """Whether a context is around each call, and is told of the one that compiles."""
    told: list[str] = []

    def backend(module: Any, _inputs: Any) -> Any:
        return lambda *given: (told.append("run"), module.forward(*given))[1]

    @contextmanager
    def around() -> Iterator[None]:
        told.append("call")
        with compiled_calls.hearing_of_compiles(
            lambda: told.append("compiles"), lambda: told.append("compiled")
        ):
            yield
        told.append("end")

    torch.compiler.reset()
    place = replacing.Place(torch._TorchCompileWrapper, "compiler_fn")
    with ExitStack() as stack:
        if named:
            stack.enter_context(compiled_calls.entering_calls("backend", around))
        else:
            stack.enter_context(place.holding(None))
            compiled_calls.enter_calls(backend, lambda: around)
        call = torch.compile(lambda x: x + 1, backend=backend)
        other = torch.compile(lambda x: x - 1, backend="eager")
        for _ in range(2):
            other(call(torch.ones(1)))
    call(torch.ones(1))
    first, second = ["call", "compiles", "compiled", "run", "end"], ["call", "run", "end"]
    return told == [*first, *second, *(["run"] if named else second)]


def _registers() -> bool:
    from torch._dynamo.backends import registry

    def backend(module: Any, _inputs: Any) -> Any:
        return module

    name = "tried by test_private_torch"
    compiler.register_backend(backend, name)
    compiler.register_backend(backend, name)  # known by now, which is no error
    try:
        return registry.lookup_backend(name) is backend
    finally:
        registry._BACKENDS.pop(name)
        registry._COMPILER_FNS.pop(name)


CHECKS: dict[str, Callable[[], Any]] = {
    "compiler.functorch_config": lambda: hasattr(
        compiler.functorch_config(), "activation_memory_budget"
    ),
    "compiler.functorch_partitioners": lambda: callable(
        compiler.functorch_partitioners().min_cut_rematerialization_partition
    ),
    "compiler.inductor_settings": _tells_settings,
    "compiler.functorch_settings": _tells_settings_of_partitions,
    "compiler.inductor_cache_folder": _keeps_codes_in_a_folder,
    "compiler.inductor_config": lambda: hasattr(compiler.inductor_config(), "fallback_random"),
    "compiled_calls.enter_calls": lambda: _calls_are_entered(named=False),
    "compiled_calls.entering_calls": lambda: _calls_are_entered(named=True),
    "compiled_calls.hearing_of_compiles": lambda: _calls_are_entered(named=True),
    "compiler.aot_autograd": lambda: callable(compiler.aot_autograd(fw_compiler=lambda m, _: m)),
    "compiler.backend_named": lambda: callable(compiler.backend_named("aot_eager")),
    "compiler.dynamo_config": lambda: hasattr(compiler.dynamo_config(), "recompile_limit"),
    "compiler.frees_tangents": lambda: isinstance(compiler.frees_tangents(), bool),
    "compiler.holds_up_to": lambda: compiler.holds_up_to(3, 3) and not compiler.holds_up_to(4, 3),
    "compiler.differentiates_inside": _differentiates_inside,
    "compiler.largest": lambda: compiler.largest(5) == 5,
    "compiler.register_backend": _registers,
    "compiler.saved_description": lambda: (
        compiler.saved_description(1, checked=True) != compiler.saved_description(1, checked=False)
    ),
    "compiler.takes_boxed": lambda: compiler.takes_boxed(lambda given: given)._boxed_call,
    "compiler.min_cut_partition": lambda: callable(
        compiler.functorch_partitioners().min_cut_rematerialization_partition
    ),
    # Inductor itself is tried by tests/planner/compiled/test_inductor.py, which take longer.
    "inductor.GeneratedCode": lambda: inductor.GeneratedCode("x", {}).text == "x",
    "inductor.compile_by_inductor": lambda: callable(inductor.compile_by_inductor),
    "inductor.compiling_by": _compiles_by,
    "inductor.custom_partitioner": lambda: (
        inductor.custom_partitioner(lambda gm, _, **kw: (gm, kw), "a name").uuid() == "a name"
    ),
    "inductor.functional_graph": _functional,
    "inductor.generate_code": lambda: callable(inductor.generate_code),
    "inductor.kernels_do_nothing": _kernels_do_nothing,
    "inductor.partitioning_by": _partitions,
    "inductor_fusion.KernelPlace": lambda: PLACED.run == 1,
    "inductor_codes.generating_once": _generates_once,
    "joined_kernels.compiling_together": _compiles_together,
    "inductor_fusion.fusing_as_told": _fuses_as_told,
    "inductor_fusion.told": _puts,
    "inductor_fusion.put": _puts,
    "inductor_fusion.put_freed": _puts,
    "compiler.forget_compiled_code": lambda: compiler.forget_compiled_code() is None,
}
