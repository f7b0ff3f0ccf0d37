"""What PyTorch's module program must know of a step: memory, operators and times of each module.

Memory and operators come from PyTorch's own trackers, the figures are put together by its own
``aggregate_stats``. Times come from our cost model, because its estimator can time calls only with
CUDA. The trackers are made for fake tensors. Here they watch a real step, because on fake ones
Transformers builds masks that no real step has, and a policy goes by the number of a call.

Left out, because its figures have no place for them: modules that no gradient passes through,
which have nothing to be recomputed for. Kept, but never recomputed: modules that a step calls
more than once, or that hold no memory that could be discarded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from graph_capture.calls.storage_id import storage_id
from graph_capture.costs.call_collector import CallCollector
from graph_capture.costs.cost_model import Call, CostModel, PreparedCostModel
from graph_capture.private_torch.module_program import (
    fitting_by,
    memory_tracker,
    module_statistics,
    operator_statistics,
)
from graph_capture.private_torch.operators import schema_of
from graph_capture.private_torch.trees import tree_leaves

from ...base.preserve_state import preserve_state
from ...base.training_step import LossFn, Sample, call_model, output_tensors, train_step
from .two_lines import TwoLines


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFigures:
    """The program's input.

    Parameters
    ----------
    graph
        PyTorch's ``Graph`` of modules, in the order in which they begin.
    operators
        PyTorch's ``SACStats`` of each module that may be recomputed, by its name there.
    paths
        Where a module lies in the model, by its name there.
    """

    graph: Any
    operators: Mapping[str, Any]
    paths: Mapping[str, str]


def module_figures(
    model: nn.Module, sample_input: Sample, loss_fn: LossFn | None, costs: CostModel
) -> ModuleFigures:
    """Track a step of a model and one more forward pass; all state is restored afterwards.

    Raises
    ------
    ValueError
        When the trackers do not see the model's own call.
    """
    state = preserve_state(model, sample_input, loss_fn, None)
    with state, torch.enable_grad():
        if isinstance(costs, PreparedCostModel):
            collector = CallCollector()
            _operators_of(model, sample_input, collector)
            costs.prepare(collector.calls)
        tracker = memory_tracker()
        tracker.track_external(model, *output_tensors(sample_input))
        with _calls_of(model) as calls, tracker:
            train_step(model, sample_input, loss_fn)
        estimator = _operators_of(model, sample_input, costs)
    names = {module: stats.mod_fqn for module, stats in tracker.memory_tracking.items()}
    last = list(reversed(dict.fromkeys(reversed(calls.ended))))
    chosen = [module for module in dict.fromkeys(calls.began) if _has_backward(tracker, module)]
    if not chosen or chosen[0] is not model:
        raise ValueError(
            f"PyTorch's trackers see no gradient enter {type(model).__name__}: its output is of a "
            "class whose tensors they do not find; return tensors, tuples, dicts, or the loss"
        )
    once = {names[module] for module, count in Counter(calls.began).items() if count == 1}
    operators = {
        name: stats
        for name, stats in estimator.sac_mod_stats.items()
        if name in once and sum(stats.memory) and sum(stats.runtimes)
    }
    estimator.sac_mod_stats = operators
    with fitting_by(TwoLines):
        estimator.pwlf_sac_tradeoff_curve()
    orders = SimpleNamespace(
        mod_runtimes={names[module]: {"fw": 0.0, "bw": 0.0} for module in chosen},  # not read
        mod_fw_pre_order=[names[module] for module in chosen],
        mod_fw_post_order=[names[module] for module in last if module in chosen],
        mod_bw_pre_order=[],
        mod_bw_post_order=[],
    )
    curves = SimpleNamespace(
        pwlf_sac_tradeoff_curve=lambda: None,
        sac_mod_tradeoff_stats=estimator.sac_mod_tradeoff_stats,
    )
    part = module_statistics()
    device = next(model.parameters()).device
    described = part.aggregate_stats(
        SimpleNamespace(modules=lambda: chosen), tracker, orders, curves, device
    )
    at = {module: path for path, module in model.named_modules()}
    return ModuleFigures(
        graph=part.parse_module_info(described),
        operators=operators,
        paths={names[module]: at[module] for module in chosen},
    )


def _operators_of(model: nn.Module, sample_input: Sample, costs: CostModel) -> Any:
    """PyTorch's estimator after a forward pass, with our times.

    All results live until it ends: it tells storages apart by their address, and one that is freed
    leaves its own to the next. A write in place would then belong to another operator.
    """
    alive = []

    def timed(func: Any, args: tuple, kwargs: dict | None) -> tuple[Any, float]:
        named = kwargs or {}
        out = func(*args, **named)
        alive.append(out)
        if _is_view(func, (args, named), out):
            return out, 0.0
        call = Call(func=func, args=args, kwargs=named, out=out, grad_enabled=True)
        return out, costs.time_ns(call) / 1e6

    estimator = operator_statistics(timed)
    with estimator:
        call_model(model, sample_input)
    return estimator


def _is_view(func: Any, given: Any, out: Any) -> bool:
    """Whether a call makes no memory and writes to none, which our costs do not count either."""
    if schema_of(func).is_mutable:
        return False
    before = {storage_id(x) for x in tree_leaves(given) if isinstance(x, Tensor)}
    return all(storage_id(x) in before for x in tree_leaves(out) if isinstance(x, Tensor))


@dataclass(frozen=True, slots=True)
class _Calls:
    """The modules of a step, as their calls begin and as they end."""

    began: list[nn.Module]
    ended: list[nn.Module]


@contextmanager
def _calls_of(model: nn.Module) -> Iterator[_Calls]:
    calls = _Calls([], [])
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _: calls.began.append(m)))
        hooks.append(module.register_forward_hook(lambda m, _, __: calls.ended.append(m)))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _has_backward(tracker: Any, module: nn.Module) -> bool:
    states = tracker.memory_tracking[module].snapshots
    return any(state.value == "Pre-Backward" for state in states)
