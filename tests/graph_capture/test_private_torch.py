"""The door to PyTorch's private names: each does what we rely on, and nobody goes around it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed._tools import sac_estimator

from graph_capture import private_torch
from graph_capture.private_torch import (
    aten,
    autograd,
    compiled_calls,
    compiler,
    devices,
    dispatch,
    fake_tensors,
    inductor,
    inductor_codes,
    inductor_fusion,
    module_program,
    modules,
    operators,
    processes,
    profiler,
    replacing,
    settings,
    sharding,
    tensors,
    trees,
)

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "graph_capture" / "private_torch"
ROOMS = [
    importlib.import_module(f"{private_torch.__name__}.{path.stem}")
    for path in sorted(DOOR.glob("*.py"))
    if path.stem != "__init__"
]
NAMES = {
    f"{room.__name__.rpartition('.')[2]}.{n}": (room, n) for room in ROOMS for n in room.__all__
}

NESTED: Any = {"a": [1, 2], "b": (3,)}
ADD = torch.ops.aten.add.Tensor


class _Function(torch.overrides.TorchFunctionMode):
    pass


class _Heard(dispatch.TorchDispatchMode):
    """Notes the operators that run under it, and the modes that are active then."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class _Loud(torch.Tensor):
    """Any function on it fails."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


def _fake() -> Any:
    return fake_tensors.FakeTensorMode().from_tensor(torch.ones(2, 3))


def _raises(error: type[Exception], operator: Any) -> bool:
    fake = _fake()
    with pytest.raises(error), fake.fake_mode:
        operator(fake)
    return True


def _node(num: int = 2) -> Any:
    return torch.ones(num, requires_grad=True).prod().grad_fn


class _Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * 2


def _holds_until_backward() -> bool:
    made = _Saving.apply(torch.ones(2, requires_grad=True)).sum()
    (node, _), *_ = made.grad_fn.next_functions
    before = autograd.holds_anything(node)
    made.backward()
    return before and not autograd.holds_anything(node)


def _under(guard: Callable[[], Any]) -> bool:
    with guard():
        return not (torch.ones(1, requires_grad=True) * 2).requires_grad


def _grad_mode_set() -> bool:
    before = torch.is_grad_enabled()
    autograd.set_grad_enabled(False)
    off = not torch.is_grad_enabled()
    autograd.set_grad_enabled(before)
    return off


def _in_backward(ask: Callable[[], Any], **options: Any) -> Any:
    leaf, answers = torch.ones(1, requires_grad=True), []
    made = leaf * 2
    made.grad_fn.register_hook(lambda *_: answers.append(ask()))
    made.backward(**options)
    return answers[0]


def _sees_what_comes() -> bool:
    one, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    parts, answers = [one * 2, other * 2], []
    made = parts[0] + parts[1]
    nodes = [part.grad_fn for part in parts]
    made.grad_fn.register_hook(lambda *_: answers.append(list(map(autograd.will_execute, nodes))))
    torch.autograd.grad(made, one, retain_graph=True)
    made.backward()
    return answers == [[True, False], [True, True]]


def _store_is_found() -> bool:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        processes.default_store().set("ours", "1")
        return processes.default_store().get("ours") == b"1"
    finally:
        torch.distributed.destroy_process_group()


def _runs_at_the_end() -> bool:
    leaf, seen = torch.ones(1, requires_grad=True), []
    made = leaf * 2
    made.grad_fn.register_hook(
        lambda *_: autograd.at_end_of_backward(lambda: seen.append(leaf.grad))
    )
    made.backward()
    return seen == [leaf.grad] and leaf.grad is not None


def _hooks_by_handle() -> bool:
    leaf, calls = torch.ones(1, requires_grad=True), []
    if autograd.post_accumulate_hooks_of(leaf):
        return False
    leaf.register_post_accumulate_grad_hook(calls.append)
    hooks = autograd.post_accumulate_hooks_of(leaf)
    waiting = dict(hooks)
    hooks.clear()
    (leaf * 2).backward()
    hooks.update(waiting)
    return not calls and list(waiting.values()) == [calls.append]


def _hooks_seen() -> bool:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        inside = autograd.top_saved_tensors_hooks(False)
    return inside is not None and autograd.top_saved_tensors_hooks(False) is None


def _level_inside() -> int:
    with torch.autograd.forward_ad.dual_level():
        return autograd.forward_derivative_level()


def _in_vmap(ask: Callable[[torch.Tensor], Any]) -> Any:
    answers = []
    torch.func.vmap(lambda x: answers.append(ask(x)) or x)(torch.ones(2))
    return answers[0]


def _legacy_batched() -> bool:
    answers = []
    leaf = torch.ones(2, requires_grad=True)
    made = leaf * 2
    made.register_hook(
        lambda g: answers.append(autograd.is_legacy_batched(g) or autograd.is_batched(g))
    )
    torch.autograd.grad(made, leaf, torch.eye(2), is_grads_batched=True)
    return answers == [True]


def _traced_state() -> bool:
    inside = []

    def function(x: torch.Tensor) -> torch.Tensor:
        inside.append(autograd.jit_tracing_state())
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions say that tracing is deprecated
        torch.jit.trace(function, torch.ones(1), check_trace=False)
    return inside[0] is not None and autograd.jit_tracing_state() is None


def _hears_nothing(guard: Callable[[], Any]) -> bool:
    with _Heard() as heard, guard():
        torch.ones(1) + 1
    return heard.calls == []


def _silent(guard: Callable[[], Any]) -> bool:
    loud = torch.ones(1).as_subclass(_Loud)
    with guard():
        return torch.add(loud, 1) is not None


def _modes_inside() -> bool:
    with _Heard() as heard:
        return dispatch.current_dispatch_modes() == [heard]


def _function_modes_inside() -> bool:
    with _Function() as mode:
        at = dispatch.num_function_modes() - 1
        return dispatch.function_mode_at(at) is mode


def _casts_nothing() -> bool:
    with torch.autocast("cpu", dtype=torch.bfloat16), dispatch.without_autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def _library_ends() -> bool:
    with operators.temporary_library("remat_door_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        inside = hasattr(torch.ops.remat_door_test, "twice")
    return inside


def _written() -> int:
    tensor = torch.ones(1)
    before = tensors.version_of(tensor)
    tensor.add_(1)
    return tensors.version_of(tensor) - before


def _passes_for_parameter() -> bool:
    fake = _fake()
    fake_tensors.pass_for_parameter(fake)
    return isinstance(fake, nn.Parameter)


def _chooses_what_takes_longest() -> bool:
    program = module_program.module_program()
    statistics = sac_estimator.SACStats(
        func_names=["mm", "add"],
        runtimes=[5.0, 1.0],
        memory=[8, 8],
        view_like_ops=[],
        rand_ops=[],
        saved_autograd_ops=[],
        inplace_ops=[],
        force_store_random=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PuLP says that it will change
        chosen = program.get_optimal_checkpointing_policy_per_module(statistics, 0.5)
    return chosen == [1, 0] and callable(program.sac_milp)


def _tracked_bytes() -> int:
    tracker, model = module_program.memory_tracker(), nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    with tracker:
        model(torch.ones(1, 3)).sum().backward()
    return tracker.memory_tracking[model].parameter_mem


def _operator_statistics() -> Any:
    estimator = module_program.operator_statistics(
        lambda func, args, kwargs: (func(*args, **(kwargs or {})), 2.0)
    )
    model = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Identity()), nn.Sigmoid())
    with estimator:
        model(torch.ones(3, requires_grad=True))
    return estimator


class _Flat:
    """A fit that says one thing."""

    def __init__(self, x: Any, y: Any) -> None:
        self.intercepts, self.fit_breaks = np.array([0.25]), np.array([0.0, 1.0])

    def fit(self, n_segments: int) -> None:
        assert n_segments == 1

    def calc_slopes(self) -> Any:
        return np.array([0.5])


def _fits_by_ours() -> bool:
    estimator = _operator_statistics()
    with module_program.fitting_by(_Flat):
        estimator.pwlf_sac_tradeoff_curve()
    curve = estimator.sac_mod_tradeoff_stats["Sequential"]
    return "pwlf" not in sys.modules and (curve.slopes, curve.intercepts) == ([0.5], [0.25])


def _recorded() -> bool:
    config = torch.autograd.ProfilerConfig(
        *(torch.autograd.ProfilerState.CPU, False, True, False, False, False),
        profiler.ExperimentalConfig(),
    )
    profiler.start_legacy_profiler(config)
    torch.empty(1000)
    records = profiler.stop_legacy_profiler()
    return any(e.kind() == "memory_alloc" for thread in records for e in thread)


def _held(place: replacing.Place) -> bool:
    before, marker = place.value, object()
    with place.holding(marker):
        inside = place.value is marker
    return inside and place.value is before


def _hooked() -> bool:
    module = nn.Linear(1, 1)
    before = modules.has_backward_hooks(module)
    module.register_full_backward_hook(lambda *_: None)
    return not before and modules.has_backward_hooks(module)


def _compiled() -> bool:
    model = nn.Linear(1, 1)
    made = torch.compile(model, backend="eager")
    names = [n for n, _ in made.named_parameters()]
    return (
        modules.compiled_from(made) is model
        and modules.compiled_from(model) is None
        and all(n.startswith(modules.COMPILED_PREFIX) for n in names)
    )


def _buckets_found() -> bool:
    source = Path(nn.parallel.distributed.__file__).read_text("utf-8")
    return "self._module_parameters = " in source  # making one takes a process group


def _replicated() -> bool:
    from torch.distributed._composable import replicate

    layer = replicate(nn.Linear(2, 2), static_graph=True)
    return modules.replicated_by(layer) == (None, {"static_graph": True}) and (
        modules.replicated_by(MODULE) is None
    )


def _prefetches_found() -> bool:
    folder = Path(torch.distributed.__file__).parent / "fsdp" / "_fully_shard"
    state = (folder / "_fsdp_state.py").read_text("utf-8")
    names = [f"self._states_to_{way}_prefetch: " for way in ("forward", "backward")]
    return all(name in state for name in names) and not sharding.prefetches_of(MODULE)


def _groups_found() -> bool:
    folder = Path(torch.distributed.__file__).parent / "fsdp" / "_fully_shard"
    state, group, parameter = (
        (folder / f"_fsdp_{part}.py").read_text("utf-8")
        for part in ("state", "param_group", "param")
    )  # sharding a module takes a process group
    names = ("mesh_info", "post_forward_mesh_info", "mp_policy", "reduce_grads", "fsdp_params")
    names += ("offload_policy",)
    return (
        sharding.gathered_group_of(MODULE) is None
        and "_fsdp_param_group" in state
        and all(re.search(rf"self\.{name}(: bool)? =", group) for name in names)
        and "self.sharded_param = " in parameter
    )


class _HeardOfParts(_Heard):
    """Leaves ``DTensor`` to itself, so that its parts come by."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def _divided() -> bool:
    """What is inside a ``DTensor``, and what a mode hears of it, in a group of one process."""
    dist = torch.distributed
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        whole = distribute_tensor(torch.ones(2, 3), mesh, [Shard(0)])
        part, division = sharding.part_of(whole), sharding.division_of(whole)
        again = sharding.whole_of(part, division, requires_grad=True)
        waited = sharding.kept_waiting(all_reduce(torch.ones(1), "sum", mesh))
        with fake_tensors.FakeTensorMode(), _HeardOfParts() as heard:
            twin = sharding.whole_of(torch.empty(2, 3), division)
            heard.calls.clear()
            with sharding.divisions_outside_of_modes():
                _ = twin + twin
        return (
            type(part) is type(waited) is torch.Tensor
            and (division.mesh, division.placements) == (mesh, (Shard(0),))
            and sharding.part_of(again) is part
            and again.requires_grad
            and heard.calls.count(ADD) == 1  # of the parts, and not of the whole, too
        )
    finally:
        dist.destroy_process_group()


TREE = trees.tree_flatten(NESTED)[1]
MODULE = nn.Sequential(nn.BatchNorm1d(2))
QKV = (torch.ones(1, 1, 2, 4),) * 3


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
    "trees.TreeSpec": lambda: isinstance(TREE, trees.TreeSpec),
    "trees.tree_flatten": lambda: trees.tree_flatten(NESTED)[0] == [1, 2, 3],
    "trees.tree_flatten_with_path": lambda: (
        [(p[0].key, v) for p, v in trees.tree_flatten_with_path(NESTED)[0]]
        == [("a", 1), ("a", 2), ("b", 3)]
    ),
    "trees.tree_iter": lambda: list(trees.tree_iter(NESTED)) == [1, 2, 3],
    "trees.tree_leaves": lambda: trees.tree_leaves(NESTED) == [1, 2, 3],
    "trees.tree_map": lambda: trees.tree_map(str, NESTED) == {"a": ["1", "2"], "b": ("3",)},
    "trees.tree_unflatten": lambda: trees.tree_unflatten([1, 2, 3], TREE) == NESTED,
    "tensors.identity_of_storage": lambda: (
        tensors.identity_of_storage((x := torch.ones(4)).untyped_storage())
        == tensors.identity_of_storage(x[1:].untyped_storage())
    ),
    "tensors.version_of": lambda: _written() == 1,
    "tensors.is_zero_tensor": lambda: (
        tensors.is_zero_tensor(torch._efficientzerotensor(2))
        and not tensors.is_zero_tensor(torch.zeros(2))
    ),
    "tensors.negated_view": lambda: tensors.negated_view(torch.ones(2)).is_neg(),
    "operators.OpOverload": lambda: isinstance(ADD, operators.OpOverload),
    "operators.OpOverloadPacket": lambda: isinstance(
        torch.ops.aten.add, operators.OpOverloadPacket
    ),
    "operators.schema_of": lambda: operators.schema_of(ADD).name == "aten::add",
    "operators.overload_name_of": lambda: (
        operators.overload_name_of(ADD) == "Tensor"
        and operators.overload_name_of(torch.ops.aten.relu.default) == "default"
    ),
    "operators.packet_of": lambda: operators.packet_of(ADD) is torch.ops.aten.add,
    "operators.has_kernel": lambda: operators.has_kernel("aten::mm", "CPU"),
    "operators.temporary_library": _library_ends,
    "operators.qualified_name_of": lambda: operators.qualified_name_of(torch.relu) == "torch.relu",
    "operators.FUNCTION_TABLES": lambda: (
        [any(hasattr(t, n) for t in operators.FUNCTION_TABLES) for n in ("mm", "gelu", "linalg_qr")]
        == [True] * 3
    ),
    "aten.assert_async": lambda: (
        aten.assert_async.default(torch.tensor(True)) is None and bool(aten.assert_async.msg)
    ),
    "aten.ctc_loss": lambda: aten.ctc_loss.Tensor is not None,
    "aten.ctc_loss_backward": lambda: (
        aten.ctc_loss_backward.Tensor is not aten.ctc_loss_backward.default
    ),
    "aten.index_put_impl": lambda: (
        aten.index_put_impl.default(
            torch.zeros(2), [torch.tensor([1, 1])], torch.ones(2), True, True
        ).tolist()
        == [0, 2]
    ),
    "aten.local_scalar_dense": lambda: aten.local_scalar_dense.default(torch.tensor(3)) == 3,
    "aten.pack_padded_sequence": lambda: (
        aten.pack_padded_sequence.default(torch.ones(2, 2), torch.tensor([2, 1]), True)[1].tolist()
        == [2, 1]
    ),
    "aten.to_copy": lambda: aten.to_copy.default(torch.ones(1), dtype=torch.int64).item() == 1,
    "aten.unsafe_view": lambda: aten.unsafe_view.default(torch.ones(4), [2, 2]).shape == (2, 2),
    "aten.attention_in_cudnn": lambda: len(aten.attention_in_cudnn.default._schema.returns) >= 4,
    "aten.attention_in_flash": lambda: len(aten.attention_in_flash.default._schema.returns) >= 4,
    "aten.attention_in_efficient": lambda: (
        len(aten.attention_in_efficient.default._schema.returns) == 4
    ),
    "aten.attention_in_math": lambda: aten.attention_in_math(*QKV)[0].shape == QKV[0].shape,
    "dispatch.TorchDispatchMode": lambda: issubclass(_Heard, dispatch.TorchDispatchMode),
    "dispatch.disable_current_modes": lambda: _hears_nothing(dispatch.disable_current_modes),
    "dispatch.current_dispatch_modes": _modes_inside,
    "dispatch.function_mode_at": _function_modes_inside,
    "dispatch.num_function_modes": _function_modes_inside,
    "dispatch.without_torch_dispatch": lambda: _hears_nothing(dispatch.without_torch_dispatch),
    "dispatch.without_torch_function": lambda: _silent(dispatch.without_torch_function),
    "dispatch.without_torch_function_of_subclasses": lambda: _silent(
        dispatch.without_torch_function_of_subclasses
    ),
    "dispatch.below_autograd": lambda: _under(dispatch.below_autograd),
    "dispatch.without_autocast": _casts_nothing,
    "fake_tensors.DataDependentOutputException": lambda: _raises(
        fake_tensors.DataDependentOutputException, lambda x: x.sum().item()
    ),
    "fake_tensors.DynamicOutputShapeException": lambda: _raises(
        fake_tensors.DynamicOutputShapeException, lambda x: x.nonzero()
    ),
    "fake_tensors.FakeTensor": lambda: isinstance(_fake(), fake_tensors.FakeTensor),
    "fake_tensors.FakeTensorMode": lambda: (_fake() + 1).shape == (2, 3),
    "fake_tensors.FAKE_TENSOR_LOGGER": lambda: (
        sys.modules[fake_tensors.FAKE_TENSOR_LOGGER].log.name == fake_tensors.FAKE_TENSOR_LOGGER
    ),
    "fake_tensors.pass_for_parameter": _passes_for_parameter,
    "autograd.current_node": lambda: _in_backward(autograd.current_node) is not None,
    "autograd.sequence_number_of": lambda: (
        autograd.sequence_number_of(_node()) < autograd.sequence_number_of(_node())
    ),
    "autograd.next_sequence_number": lambda: (
        autograd.next_sequence_number() == autograd.sequence_number_of(_node())
    ),
    "autograd.input_metadata_of": lambda: tuple(autograd.input_metadata_of(_node())[0].shape) == (),
    "autograd.saved_by": lambda: autograd.saved_by(_node(), "self").tolist() == [1, 1],
    "autograd.held_by": lambda: [t.tolist() for t in autograd.held_by(_node())] == [1, [1, 1]],
    "autograd.holds_anything": _holds_until_backward,
    "autograd.keeps_graph": lambda: (
        _in_backward(autograd.keeps_graph, retain_graph=True)
        and not _in_backward(autograd.keeps_graph)
    ),
    "autograd.will_execute": _sees_what_comes,
    "processes.default_store": _store_is_found,
    "autograd.at_end_of_backward": _runs_at_the_end,
    "autograd.post_accumulate_hooks_of": _hooks_by_handle,
    "autograd.set_grad_enabled": _grad_mode_set,
    "autograd.top_saved_tensors_hooks": _hooks_seen,
    "autograd.innermost_transform": lambda: (
        _in_vmap(lambda _: autograd.innermost_transform()) is not None
        and autograd.innermost_transform() is None
    ),
    "autograd.jit_tracing_state": _traced_state,
    "autograd.forward_derivative_level": lambda: (
        _level_inside() == 0 and autograd.forward_derivative_level() == -1
    ),
    "autograd.is_wrapped_by_transform": lambda: _in_vmap(autograd.is_wrapped_by_transform),
    "autograd.is_batched": lambda: _in_vmap(autograd.is_batched),
    "autograd.is_legacy_batched": _legacy_batched,
    "modules.parameters_of": lambda: [*modules.parameters_of(MODULE[0])] == ["weight", "bias"],
    "modules.buffers_of": lambda: "running_mean" in modules.buffers_of(MODULE[0]),
    "modules.children_of": lambda: modules.children_of(MODULE) == {"0": MODULE[0]},
    "modules.FOREACH_TYPES": lambda: nn.Parameter in modules.FOREACH_TYPES,
    "modules.COMPILED_PREFIX": _compiled,
    "modules.compiled_from": _compiled,
    "modules.has_backward_hooks": _hooked,
    "modules.active_data_parallel": lambda: modules.active_data_parallel() is None,
    "modules.bucketed_parameters_of": _buckets_found,
    "modules.replicated_by": _replicated,
    "sharding.gathered_group_of": _groups_found,
    **dict.fromkeys(
        (
            "sharding.division_of",
            "sharding.divisions_outside_of_modes",
            "sharding.kept_waiting",
            "sharding.part_of",
            "sharding.whole_of",
        ),
        _divided,
    ),
    "sharding.prefetches_of": _prefetches_found,
    "settings.onednn_enabled": lambda: settings.onednn_enabled() is True,
    "settings.cudnn_enabled": lambda: settings.cudnn_enabled() == torch.backends.cudnn.enabled,
    "settings.flash_attention_enabled": lambda: settings.flash_attention_enabled() is True,
    "settings.efficient_attention_enabled": lambda: settings.efficient_attention_enabled() is True,
    "settings.math_attention_enabled": lambda: settings.math_attention_enabled() is True,
    "settings.cudnn_attention_enabled": lambda: settings.cudnn_attention_enabled() is True,
    "settings.attention_priorities": lambda: (
        int(torch.nn.attention.SDPBackend.MATH) in settings.attention_priorities()
    ),
    "settings.deterministic_algorithms": lambda: (
        settings.deterministic_algorithms() == torch.are_deterministic_algorithms_enabled()
    ),
    "devices.cuda_guard_setter": lambda: callable(devices.cuda_guard_setter()),
    "devices.cublas_workspace_clearer": lambda: (
        callable(devices.cublas_workspace_clearer()) or not torch.backends.cuda.is_built()
    ),
    "devices.suggest_memory_format": lambda: (
        devices.suggest_memory_format(torch.ones(1, 2, 2, 2)) == torch.contiguous_format
    ),
    "profiler.ExperimentalConfig": _recorded,
    "profiler.start_legacy_profiler": _recorded,
    "profiler.stop_legacy_profiler": _recorded,
    "replacing.Place": lambda: _held(replacing.Place(torch.nn, "Linear")),
    "replacing.ENGINE": lambda: _held(replacing.ENGINE),
    "replacing.IS_COMPILING": lambda: (
        _held(replacing.IS_COMPILING) and replacing.IS_COMPILING.value is False
    ),
    "replacing.CONVOLUTION_LAYOUT": lambda: _held(replacing.CONVOLUTION_LAYOUT),
    "replacing.PAD_PACKED_SEQUENCE": lambda: _held(replacing.PAD_PACKED_SEQUENCE),
    "replacing.CHECKPOINT_GENERATOR": lambda: _held(replacing.CHECKPOINT_GENERATOR),
    "compiler.functorch_config": lambda: hasattr(
        compiler.functorch_config(), "activation_memory_budget"
    ),
    "compiler.functorch_partitioners": lambda: callable(
        compiler.functorch_partitioners().min_cut_rematerialization_partition
    ),
    "compiler.inductor_settings": _tells_settings,
    "compiler.inductor_cache_folder": _keeps_codes_in_a_folder,
    "compiler.inductor_config": lambda: hasattr(compiler.inductor_config(), "fallback_random"),
    "module_program.module_program": _chooses_what_takes_longest,
    "module_program.module_statistics": lambda: (
        module_program.module_statistics().Graph(1).ad_matrix.shape == (1, 1)
    ),
    "module_program.memory_tracker": lambda: _tracked_bytes() == 4 * (2 * 3 + 2),
    "module_program.operator_statistics": lambda: (
        _operator_statistics().sac_mod_stats["Sequential"].func_names
        == ["view", "view", "tanh", "sigmoid"]
    ),
    "module_program.never_counted": lambda: (
        torch.ops.aten.detach.default in module_program.never_counted()
    ),
    "module_program.fitting_by": _fits_by_ours,
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
    "inductor_fusion.fusing_as_told": _fuses_as_told,
    "inductor_fusion.told": _puts,
    "inductor_fusion.put": _puts,
    "inductor_fusion.put_freed": _puts,
    "compiler.forget_compiled_code": lambda: compiler.forget_compiled_code() is None,
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_name_does_what_we_rely_on(name: str) -> None:
    """It is there in this PyTorch and does the least thing that is asked of it."""
    assert CHECKS[name]()


def test_nothing_is_tried_that_is_not_there() -> None:
    """One check a name, no more."""
    assert CHECKS.keys() == NAMES.keys()


def test_door_names_its_rooms() -> None:
    """Its docstring says what each file is for."""
    said = set(re.findall(r"``([a-z_]+)``", private_torch.__doc__ or ""))
    assert {room.__name__.rpartition(".")[2] for room in ROOMS} <= said


def test_door_itself_loads_nothing() -> None:
    """Who only names the package pays nothing."""
    code = "import sys, graph_capture.private_torch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_compiler_is_not_loaded_by_naming_it() -> None:
    """Importing every room imports neither the partitioner nor what compiles."""
    rooms = ", ".join(f"graph_capture.private_torch.{p.stem}" for p in DOOR.glob("[a-z]*.py"))
    heavy = ("torch._functorch.partitioners", "torch._inductor", "torch._dynamo.eval_frame")
    code = f"import sys, {rooms}; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


# -- the door is shut ------------------------------------------------------------------------

FILES = [
    path
    for package in ("graph_capture", "planner", "solvers")
    for path in sorted((ROOT / package).rglob("*.py"))
    if DOOR not in path.parents
]
PYTHON = {"_getframe", "_exit", "_replace", "_fields", "_asdict", "_make"}
"""Names that Python documents in spite of their underscore."""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _written_here() -> set[str]:
    """Private names that our own files give: to functions, methods, fields, attributes of self."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) in ("self", "cls")
            ):
                names.add(node.attr)
    return names


OURS = _written_here()
BEHIND = frozenset(
    name
    for path in DOOR.glob("*.py")
    for name in re.findall(r"\b_[a-z]\w+", path.read_text("utf-8"))
)
"""Private names that the door speaks of: an own attribute of the same name is no excuse."""


def _around_the_door(source: str) -> list[str]:
    """What a file takes from PyTorch's private names by itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            text = ast.unparse(node)
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            ours = node.attr in OURS and node.attr not in BEHIND
            if text.startswith("torch.") or not (of_self or ours or node.attr in PYTHON):
                found.append(text)
            continue
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._"):
            names = [ast.unparse(node)]
        else:
            continue
        private = (n for n in names if n.split(".")[0] in ("torch", "functorch"))
        found += [n for n in private if any(map(_is_private, n.split(".")))]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_goes_around_the_door(path: Path) -> None:
    """Private names of PyTorch, and private attributes of its objects, come through the door."""
    assert _around_the_door(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.autograd import _engine_run_backward",
        "from torch import _VF",
        "torch._C.DisableTorchFunction()",
        "getattr(torch._C, name)",
        "torch.ops.aten._to_copy.default",
        "func._schema.name",
        "node._saved_self",
        "module._parameters",
        "module._buffers",
        "storage()._cdata",
    ],
)
def test_ways_around_are_seen(source: str) -> None:
    """Each of the ways in which files took private names before."""
    assert _around_the_door(source)


NOT_OF_TORCH = {"replacing.Place", "inductor.GeneratedCode", "inductor_fusion.KernelPlace"}


@pytest.mark.parametrize("name", sorted(NAMES.keys() - NOT_OF_TORCH))
def test_line_says_since_when(name: str) -> None:
    """The version is said beside a name, above it, or in its docstring."""
    room, short = NAMES[name]
    lines = inspect.getsource(room).splitlines()
    pattern = re.compile(rf"(def {short}\(| {{4}}{short},|{short}(: .+)? = )")
    at = next(i for i, line in enumerate(lines) if pattern.match(line))
    said = lines[at - 1 : at + 2] if lines[at].startswith("def") else lines[at - 1 : at + 1]
    assert re.search(r"\b2\.\d+\+", " ".join(said))
