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

from .world import MOVES, Unfit, World, named_move


@named_move("deep copy")
def _deepcopy(world: World) -> None:
    world.model = copy.deepcopy(world.model)
    world.call = world.model


@named_move("pickled")
def _pickled(world: World) -> None:
    world.model = pickle.loads(pickle.dumps(world.model))
    world.call = world.model


@named_move("saved whole and loaded")
def _saved(world: World) -> None:
    stream = io.BytesIO()
    torch.save(world.model, stream)
    stream.seek(0)
    world.model = torch.load(stream, weights_only=False)
    world.call = world.model


@named_move("forward replaced by a wrapper")
def _forward_wrapped(world: World) -> None:
    before = world.model.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    world.model.forward = forward  # type: ignore[method-assign]


@named_move("forward replaced by the class' own")
def _forward_class(world: World) -> None:
    world.model.forward = type(world.model).forward.__get__(world.model)  # type: ignore[method-assign]


@named_move("forward under autocast, as accelerate does")
def _forward_accelerate(world: World) -> None:
    function = world.model.forward
    function = getattr(function, "__func__", function)
    model = world.model
    before = world.model.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    world.model.forward = forward.__get__(model)  # type: ignore[method-assign]


@named_move("called through forward")
def _through_forward(world: World) -> None:
    world.call = world.model.forward


@named_move("compiled wrapper")
def _compiled(world: World) -> None:
    world.call = torch.compile(world.model, backend="eager")


@named_move("data parallel wrapper")
def _data_parallel(world: World) -> None:
    world.call = nn.DataParallel(world.model)


@named_move("inside another module")
def _inside(world: World) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    world.call = Outer(world.model)


@named_move("plan taken off and put on again")
def _again(world: World) -> None:
    if world.planned:
        from planner import Plan
        from planner.running.attach import applied_plan

        plan = applied_plan(world.model)
        plan = getattr(plan, "plan", plan)
        if plan is None:
            raise Unfit("no plan")
        Plan.remove(world.model)
        plan.apply(world.model, on_shape_change=world.policy)


def _optimizer(label: str, build: Callable[..., torch.optim.Optimizer]) -> None:
    def change(world: World) -> None:
        world.build_optimizer = build

    MOVES[label] = change


_optimizer("SGD with momentum", functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9))
_optimizer("AdamW", functools.partial(torch.optim.AdamW, lr=1e-3))
_optimizer("AdamW, foreach", functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True))
_optimizer("AdamW, fused", functools.partial(torch.optim.AdamW, lr=1e-3, fused=True))


@named_move("deterministic algorithms")
def _deterministic(world: World) -> None:
    torch.use_deterministic_algorithms(True)
