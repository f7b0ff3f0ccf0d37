"""Modes that hear every operator, and guards that keep parts of PyTorch out of a call."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # 2.11+; hears every operator below autograd
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

# 2.11+; real tensors while a mode is active
disable_current_modes = _disable_current_modes
# 2.11+; the modes that are active, innermost last
current_dispatch_modes = _get_current_dispatch_mode_stack
# 2.11+; how many modes hear functions of torch
num_function_modes = torch._C._len_torch_function_stack
# 2.11+; one of them, innermost last
function_mode_at = torch._C._get_function_stack_at
# 2.11+; no __torch_dispatch__ at all, modes and subclasses alike
without_torch_dispatch = torch._C._DisableTorchDispatch
# 2.11+; no __torch_function__ at all, modes and subclasses alike
without_torch_function = torch._C.DisableTorchFunction
# 2.11+; no __torch_function__ of subclasses
without_torch_function_of_subclasses = torch._C.DisableTorchFunctionSubclass
# 2.11+; operators run without autograd's record, views and versions of it included
below_autograd = torch._C._AutoDispatchBelowAutograd
# 2.11+; no casts by autocast
without_autocast = torch._C._DisableAutocast

__all__ = [
    "TorchDispatchMode",
    "below_autograd",
    "current_dispatch_modes",
    "disable_current_modes",
    "function_mode_at",
    "num_function_modes",
    "without_autocast",
    "without_torch_dispatch",
    "without_torch_function",
    "without_torch_function_of_subclasses",
]
