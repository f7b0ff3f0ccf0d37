"""Contexts that a plan does not support, in which the model's own forward runs.

A planned step is a few nodes of the autograd graph. Tools that look inside a step (a
tracer, hooks on what operators save, forward-mode derivatives) would find nothing
there, or operators other than the model's own.
"""

from __future__ import annotations

import torch

from graph_capture.private_torch.autograd import (
    forward_derivative_level,
    innermost_transform,
    jit_tracing_state,
    top_saved_tensors_hooks,
)
from graph_capture.private_torch.dispatch import function_mode_at, num_function_modes


def foreign_surroundings() -> str | None:
    """Say why the plan cannot run this call; ``None`` if it can."""
    if innermost_transform() is not None:
        return "it is called under a transform of torch.func"
    if forward_derivative_level() >= 0:
        return "it is called in forward_ad.dual_level(), and a plan holds no forward derivatives"
    if top_saved_tensors_hooks(False) is not None:
        return (
            "it is called under saved_tensors_hooks (save_on_cpu, an activation offloader, an "
            "outer torch.utils.checkpoint), and what a plan saves is not what the model's "
            "operators save; do not use the hooks around a planned model"
        )
    if jit_tracing_state() is not None:
        return "it is called by torch.jit.trace"
    if torch.compiler.is_exporting():
        return "it is called by torch.export"
    if num_function_modes() and _hears_functions():
        return "it is called under a TorchFunctionMode, which hears the functions of torch"
    return None


def _hears_functions() -> bool:
    """Whether a mode is active beside that of ``torch.device`` and ``set_default_device``."""
    modes = map(function_mode_at, range(num_function_modes()))
    return any(type(mode).__module__ != "torch.utils._device" for mode in modes)
