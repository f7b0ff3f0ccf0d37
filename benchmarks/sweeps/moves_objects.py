"""A model copied, wrapped and stored between steps; other optimizers."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .loop_side import MOVES, LoopSide, Unfit, named_move


@named_move("deep copy")
def _deepcopy(side: LoopSide) -> None:
    side.model = copy.deepcopy(side.model)
    side.call = side.model


@named_move("pickled")
def _pickled(side: LoopSide) -> None:
    side.model = pickle.loads(pickle.dumps(side.model))
    side.call = side.model


@named_move("saved whole and loaded")
def _saved(side: LoopSide) -> None:
    stream = io.BytesIO()
    torch.save(side.model, stream)
    stream.seek(0)
    side.model = torch.load(stream, weights_only=False)
    side.call = side.model


@named_move("forward replaced by a wrapper")
def _forward_wrapped(side: LoopSide) -> None:
    before = side.model.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    side.model.forward = forward  # type: ignore[method-assign]


@named_move("forward replaced by the class' own")
def _forward_class(side: LoopSide) -> None:
    side.model.forward = type(side.model).forward.__get__(side.model)  # type: ignore[method-assign]


@named_move("forward under autocast, as accelerate does")
def _forward_accelerate(side: LoopSide) -> None:
    function = side.model.forward
    function = getattr(function, "__func__", function)
    model = side.model
    before = side.model.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    side.model.forward = forward.__get__(model)  # type: ignore[method-assign]


@named_move("called through forward")
def _through_forward(side: LoopSide) -> None:
    side.call = side.model.forward


@named_move("compiled wrapper")
def _compiled(side: LoopSide) -> None:
    side.call = torch.compile(side.model, backend="eager")


@named_move("data parallel wrapper")
def _data_parallel(side: LoopSide) -> None:
    side.call = nn.DataParallel(side.model)


@named_move("inside another module")
def _inside(side: LoopSide) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    side.call = Outer(side.model)


@named_move("plan taken off and put on again")
def _again(side: LoopSide) -> None:
    if side.planned:
        from planner import Plan
        from planner.running.attach import applied_plan

        plan = applied_plan(side.model)
        plan = getattr(plan, "plan", plan)
        if plan is None:
            raise Unfit("no plan")
        Plan.remove(side.model)
        plan.apply(side.model, on_shape_change=side.policy)


def _optimizer(label: str, build: Callable[..., torch.optim.Optimizer]) -> None:
    def change(side: LoopSide) -> None:
        side.build_optimizer = build

    MOVES[label] = change


_optimizer("SGD with momentum", functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9))
_optimizer("AdamW", functools.partial(torch.optim.AdamW, lr=1e-3))
_optimizer("AdamW, foreach", functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True))
_optimizer("AdamW, fused", functools.partial(torch.optim.AdamW, lr=1e-3, fused=True))


@named_move("deterministic algorithms")
def _deterministic(side: LoopSide) -> None:
    torch.use_deterministic_algorithms(True)
