"""Hooks that are added and removed between steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import loop_models
from .loop_side import LoopSide, Unfit, named_move


def _doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2.0 if isinstance(output, Tensor) else output


def _half_gradient(module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in grad_in)


@named_move("a forward hook on a layer")
def _forward_hook(side: LoopSide) -> None:
    side.handles.append(side.part(side.case.hooked).register_forward_hook(_doubled))


@named_move("a pre-hook on a layer")
def _pre_hook(side: LoopSide) -> None:
    side.handles.append(
        side.part(side.case.hooked).register_forward_pre_hook(lambda m, a: (a[0] * 0.5, *a[1:]))
    )


@named_move("a backward hook on a layer")
def _backward_hook(side: LoopSide) -> None:
    side.handles.append(side.part(side.case.hooked).register_full_backward_hook(_half_gradient))


@named_move("a backward pre-hook on a layer")
def _backward_pre_hook(side: LoopSide) -> None:
    side.handles.append(
        side.part(side.case.hooked).register_full_backward_pre_hook(
            lambda m, g: tuple(x * 0.5 for x in g)
        )
    )


@named_move("a forward hook on the root")
def _root_hook(side: LoopSide) -> None:
    side.handles.append(side.model.register_forward_hook(_doubled))


@named_move("a pre-hook on the root")
def _root_pre_hook(side: LoopSide) -> None:
    side.handles.append(
        side.model.register_forward_pre_hook(
            lambda m, a, k: (
                a,
                {
                    n: v * 0.5 if v.is_floating_point() else v
                    for n, v in k.items()
                    if isinstance(v, Tensor)
                },
            ),
            with_kwargs=True,
        )
    )


@named_move("a backward hook on the root")
def _root_backward_hook(side: LoopSide) -> None:
    if side.case.loss is None or isinstance(side.model, loop_models.TwoHeads):
        raise Unfit("outputs in an object")
    side.handles.append(side.model.register_full_backward_hook(_half_gradient))


@named_move("a hook on a parameter's gradient")
def _parameter_hook(side: LoopSide) -> None:
    parameter = next(side.model.parameters())
    if not parameter.requires_grad:
        raise Unfit("frozen")
    side.handles.append(parameter.register_hook(lambda g: g * 3.0))


@named_move("a hook after a gradient is accumulated")
def _accumulate_hook(side: LoopSide) -> None:
    parameter = next(side.model.parameters())
    if not parameter.requires_grad:
        raise Unfit("frozen")

    def clip(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.clamp_(-1e-3, 1e-3)

    side.handles.append(parameter.register_post_accumulate_grad_hook(clip))


@named_move("a hook on all modules")
def _global_hook(side: LoopSide) -> None:
    if side.planned:  # the twin goes first; its registration is seen by both
        return
    nn.modules.module.register_module_forward_hook(
        lambda m, a, out: out * 1.5 if isinstance(m, nn.Linear) else None
    )


@named_move("hooks taken off")
def _hooks_off(side: LoopSide) -> None:
    if not side.handles:
        raise Unfit("no hooks")
    for handle in side.handles:
        handle.remove()
    side.handles.clear()
