"""What we rely on of autograd's nodes, engine and state of a thread."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from graph_capture.private_torch import (
    autograd,
)


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


def _backward_hooks_by_handle() -> bool:
    made = torch.ones(1, requires_grad=True) * 2
    none = autograd.backward_hooks_of(made)
    handle = made.register_hook(lambda g: g)
    return not none and list(autograd.backward_hooks_of(made)) == [handle.id]


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


CHECKS: dict[str, Callable[[], Any]] = {
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
    "autograd.at_end_of_backward": _runs_at_the_end,
    "autograd.post_accumulate_hooks_of": _hooks_by_handle,
    "autograd.backward_hooks_of": _backward_hooks_by_handle,
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
}
