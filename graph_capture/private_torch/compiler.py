"""What ``torch.compile`` partitions and compiles with; each is imported when it is asked for."""

from __future__ import annotations

from typing import Any


def functorch_config() -> Any:
    """``torch._functorch.config``, which holds ``activation_memory_budget``; 2.11+."""
    import torch._functorch.config

    return torch._functorch.config


def functorch_partitioners() -> Any:
    """``torch._functorch.partitioners``: the min-cut partitioner of a joint graph; 2.11+."""
    import torch._functorch.partitioners

    return torch._functorch.partitioners


def inductor_config() -> Any:
    """``torch._inductor.config``, which holds ``fallback_random``: draws as eager's; 2.11+."""
    import torch._inductor.config

    return torch._inductor.config


def inductor_settings() -> str:
    """Settings that Inductor's code depends on (``get_config_copy``), for caches; 2.11+.

    All but who partitions, and whether code is looked for in PyTorch's own caches.
    """
    settings = inductor_config().get_config_copy()
    for name in ("custom_partitioner_fn", "fx_graph_cache", "fx_graph_remote_cache"):
        settings.pop(name, None)
    return repr(sorted(settings.items()))


def functorch_settings() -> str:
    """Settings that PyTorch's own partition depends on (``get_config_copy``), for caches; 2.11+.

    All but its budget, which is not used, and its cache.
    """
    settings = functorch_config().get_config_copy()
    for name in ("activation_memory_budget", "enable_autograd_cache"):
        settings.pop(name, None)
    return repr(sorted(settings.items()))


def inductor_cache_folder() -> str | None:
    """``cache_dir_utils.cache_dir``: where compiled code is kept; ``None`` where it is not; 2.11+.

    That is where ``fx_graph_cache`` is off or ``force_disable_caches`` on.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    config = inductor_config()
    if config.force_disable_caches or not config.fx_graph_cache:
        return None
    folder: str = cache_dir()
    return folder


def forget_compiled_code() -> None:
    """``torch._dynamo.reset()``: no compiled code of the process is left; 2.11+."""
    import torch._dynamo

    torch._dynamo.reset()


def aot_autograd(**options: Any) -> Any:
    """``torch._dynamo.backends.common.aot_autograd``: a backend from two compilers; 2.11+."""
    from torch._dynamo.backends.common import aot_autograd as make

    return make(**options)


def register_backend(backend: Any, name: str) -> None:
    """``torch._dynamo.register_backend``, unless an entry point has the name; 2.11+."""
    from torch._dynamo.backends import registry

    if name not in registry._BACKENDS:
        registry.register_backend(backend, name=name)


def backend_named(name: str) -> Any:
    """``torch._dynamo.backends.registry.lookup_backend``; 2.11+."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def dynamo_config() -> Any:
    """``torch._dynamo.config``, which says how often one function is compiled; 2.11+."""
    import torch._dynamo.config

    return torch._dynamo.config


def takes_boxed(function: Any) -> Any:
    """Mark a compiled graph as one that takes its arguments in one list and empties it; 2.11+."""
    function._boxed_call = True
    return function


def min_cut_partition(module: Any, inputs: Any, **options: Any) -> tuple[Any, Any]:
    """PyTorch's own partition, which saves for speed; the module is used up; 2.11+."""
    with functorch_config().patch(activation_memory_budget=1.0):
        partition = functorch_partitioners().min_cut_rematerialization_partition
        forward, backward = partition(module, inputs, compiler="inductor", **options)
    return forward, backward


def frees_tangents() -> bool:
    """Whether compiled code may free gradients of outputs (``boxed_grads_call``); 2.13+."""
    from torch.autograd import Function

    return hasattr(Function, "boxed_grads_call")


def saved_description(position: int, *, checked: bool) -> Any:
    """What AOTAutograd calls a tensor that forward hands to backward; 2.11+."""
    from torch._functorch._aot_autograd import descriptors

    if checked:
        return descriptors.SavedForBackwardsAOTOutput(position)
    return descriptors.SavedForBackwardsNoVcCheckAOTOutput(position)


_DIFFERENTIATES = ("_autograd_grad", "_grad_increment_nesting")


def differentiates_inside(module: Any) -> bool:
    """Whether Dynamo's graph itself computes gradients (``torch.func.grad``); 2.11+."""
    return any(getattr(n.target, "__name__", "") in _DIFFERENTIATES for n in module.graph.nodes)


def largest(number: Any) -> Any:
    """The largest value of a symbol, the sample's if it has no bound, or the number; 2.11+."""
    node = getattr(number, "node", None)
    if node is None:
        return number
    bounds = node.shape_env.bound_sympy(node.expr)
    if bounds.upper.is_Integer and bounds.upper < 2**40:
        return int(bounds.upper)
    return node.hint


def holds_up_to(number: Any, most: int) -> bool:
    """Whether a symbol is at most that; a guard: calls where it is not compile again; 2.11+."""
    return bool(number <= most)


__all__ = [
    "aot_autograd",
    "backend_named",
    "differentiates_inside",
    "dynamo_config",
    "forget_compiled_code",
    "frees_tangents",
    "functorch_config",
    "functorch_settings",
    "functorch_partitioners",
    "holds_up_to",
    "inductor_cache_folder",
    "inductor_config",
    "inductor_settings",
    "largest",
    "min_cut_partition",
    "register_backend",
    "saved_description",
    "takes_boxed",
]
