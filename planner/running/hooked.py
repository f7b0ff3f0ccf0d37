"""Whether hooks wait for gradients of a planned step, which then arrive one by one.

Gradients that leave one autograd node together reach their hooks in an order that autograd
leaves to a heap. Hooks that draw random numbers, count or log must find eager's order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from graph_capture.private_torch.autograd import backward_hooks_of, post_accumulate_hooks_of

from .unplanned_backward import Listening


def has_hooks(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether somebody else than this package has put a hook on one of the tensors' gradients."""
    tensors = tuple(tensors)
    if any(map(backward_hooks_of, tensors)):
        return True
    found = (hooks for hooks in map(post_accumulate_hooks_of, tensors) if hooks)
    return any(not isinstance(hook, Listening) for hooks in found for hook in hooks.values())


__all__ = ["has_hooks"]
