"""Nodes of the autograd graph, backward passes, and what a call runs under."""

from __future__ import annotations

from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch.autograd import forward_ad

# -- nodes ---------------------------------------------------------------------------------

# 2.11+; the node that the engine runs in this thread
current_node = torch._C._current_autograd_node
# 2.11+; when a node was made, which orders the engine's queue
sequence_number_of = methodcaller("_sequence_nr")
# 2.11+; the number that the next node gets in this thread
next_sequence_number = torch.autograd._get_sequence_nr
# 2.11+; shape, type and device of each gradient that a node takes
input_metadata_of = attrgetter("_input_metadata")


def saved_by(node: Any, name: str) -> Any:
    """What a node holds of its operator under a name of derivatives.yaml, as "self"; 2.11+."""
    return getattr(node, f"_saved_{name}")


def held_by(node: Any) -> list[torch.Tensor]:
    """All tensors that a node keeps (``_raw_saved_…``), with no hook asked to unpack them; 2.11+.

    A leaf's node keeps the leaf, one of AOTAutograd's also ``_tensors_no_vc_check``. After its
    backward pass a node keeps nothing.
    """
    found = [getattr(node, "variable", None)]
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            try:
                raw = getattr(node, name) or ()
            except RuntimeError:  # freed
                return []
            found += [saved.data for saved in (raw if isinstance(raw, tuple) else (raw,))]
    found += getattr(node, "_tensors_no_vc_check", None) or ()
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def holds_anything(node: Any) -> bool:
    """Whether a node of a ``Function`` still keeps a tensor (``_raw_saved_tensors``); 2.11+."""
    try:
        saved = node._raw_saved_tensors or ()
    except RuntimeError:  # freed
        return False
    return any(one.data is not None for one in saved) or bool(
        getattr(node, "_tensors_no_vc_check", None)
    )


# -- a backward pass -----------------------------------------------------------------------

# 2.11+; whether the backward pass of this thread has retain_graph=True
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
# 2.11+; whether the backward pass of this thread will come to a node
will_execute = torch._C._will_engine_execute_node
# 2.11+; sets grad mode as a plain call, where generated code has no ``with``
set_grad_enabled = torch._C._set_grad_enabled

# 2.11+; runs a function when the backward pass of this thread has ended
at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback
# 2.11+; a leaf's hooks that run once its gradient is there, by their handles; or None
post_accumulate_hooks_of = attrgetter("_post_accumulate_grad_hooks")
# 2.11+; a tensor's hooks on its gradient, by their handles; or None
backward_hooks_of = attrgetter("_backward_hooks")

# -- what a call runs under ----------------------------------------------------------------

# 2.11+; hooks of saved_tensors_hooks that are active, or None
top_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# 2.11+; the innermost transform of torch.func, or None
innermost_transform = torch._C._functorch.peek_interpreter_stack
# 2.11+; the state of torch.jit.trace, or None
jit_tracing_state = torch._C._get_tracing_state


def forward_derivative_level() -> int:
    """How many ``forward_ad.dual_level()`` are open, less one; 2.11+."""
    return forward_ad._current_level


# -- tensors of torch.func -----------------------------------------------------------------

# 2.11+; whether any transform wraps a tensor
is_wrapped_by_transform = torch._C._functorch.is_functorch_wrapped_tensor
# 2.11+; whether it is one of vmap's
is_batched = torch._C._functorch.is_batchedtensor
# 2.11+; whether it is one of is_grads_batched=True's
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

__all__ = [
    "at_end_of_backward",
    "backward_hooks_of",
    "current_node",
    "forward_derivative_level",
    "held_by",
    "holds_anything",
    "innermost_transform",
    "input_metadata_of",
    "is_batched",
    "is_legacy_batched",
    "is_wrapped_by_transform",
    "jit_tracing_state",
    "keeps_graph",
    "next_sequence_number",
    "post_accumulate_hooks_of",
    "saved_by",
    "sequence_number_of",
    "set_grad_enabled",
    "top_saved_tensors_hooks",
    "will_execute",
]
