"""What we rely on of modules, wrappers, processes and settings."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed._tools import sac_estimator

from graph_capture.private_torch import (
    devices,
    fake_tensors,
    module_program,
    modules,
    processes,
    profiler,
    replacing,
    settings,
    sharding,
)

from .subjects import ADD, Heard


def _store_is_found() -> bool:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        processes.default_store().set("ours", "1")
        return processes.default_store().get("ours") == b"1"
    finally:
        torch.distributed.destroy_process_group()


def _chooses_what_takes_longest() -> bool:
    pytest.importorskip("pulp")  # of the extra "peers"
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


class _HeardOfParts(Heard):
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


MODULE = nn.Sequential(nn.BatchNorm1d(2))


CHECKS: dict[str, Callable[[], Any]] = {
    "processes.default_store": _store_is_found,
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
}
