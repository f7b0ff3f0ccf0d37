"""Other calls of a model, and other uses of what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from . import loop_models
from .world import Unfit, World, named_move


@named_move("another batch")
def _batch(world: World) -> None:
    world.batch = 5


@named_move("the first batch size again")
def _batch_back(world: World) -> None:
    world.batch = loop_models.BATCH


@named_move("a strided input")
def _strided(world: World) -> None:
    world.change_sample = lambda s: {
        k: v.repeat_interleave(2, 0)[::2] if isinstance(v, Tensor) else v for k, v in s.items()
    }


@named_move("an input that requires grad")
def _input_grad(world: World) -> None:
    if world.case.loss is None:
        raise Unfit("tokens")
    world.change_sample = lambda s: {k: v.requires_grad_() for k, v in s.items()}


@named_move("a negated view as input")
def _negative(world: World) -> None:
    if world.case.loss is None:
        raise Unfit("tokens")
    world.change_sample = lambda s: {k: torch._neg_view(v) for k, v in s.items()}


@named_move("an argument more")
def _argument(world: World) -> None:
    if world.case.loss is None:
        world.change_sample = lambda s: {**s, "use_cache": False}
    else:
        world.change_sample = lambda s: {**s, "scale": 2.0}


@named_move("an argument at its default")
def _default_argument(world: World) -> None:
    if world.case.loss is None:
        raise Unfit("no default")
    world.change_sample = lambda s: {**s, "scale": 1.0}


@named_move("an attention mask")
def _mask(world: World) -> None:
    if world.case.loss is not None:
        raise Unfit("no text")
    world.change_sample = lambda s: {**s, "attention_mask": torch.ones_like(s["input_ids"])}


@named_move("inputs in float16 values")
def _rounded(world: World) -> None:
    world.change_sample = lambda s: {
        k: v.half().float() if v.is_floating_point() else v for k, v in s.items()
    }


@named_move("autocast on")
def _autocast(world: World) -> None:
    world.autocast = True


@named_move("autocast off")
def _autocast_off(world: World) -> None:
    world.autocast = False


@named_move("another loss")
def _other_loss(world: World) -> None:
    if isinstance(world.model, loop_models.TwoHeads):
        world.loss = lambda out: out.main.abs().mean()
    elif world.case.loss is None:
        world.loss = lambda out: out.loss * 2.0
    else:
        world.loss = lambda out: out.abs().mean()


@named_move("outputs that were not planned as differentiated")
def _detached(world: World) -> None:
    if isinstance(world.model, loop_models.TwoHeads):
        world.loss = lambda out: out.main.pow(2).mean() + out.side.pow(2).mean()
    elif world.case.loss is None:
        world.loss = lambda out: out.loss + 0.1 * out.logits.pow(2).mean()
    else:
        raise Unfit("one output")


@named_move("only an output that was not planned as differentiated")
def _only_detached(world: World) -> None:
    if isinstance(world.model, loop_models.TwoHeads):
        world.loss = lambda out: out.side.pow(2).mean()
    elif world.case.loss is None:
        world.loss = lambda out: out.logits.pow(2).mean()
    else:
        raise Unfit("one output")


@named_move("a detached output, read")
def _detached_read(world: World) -> None:
    if isinstance(world.model, loop_models.TwoHeads):
        world.loss = lambda out: out.main.pow(2).mean() + out.side.detach().pow(2).mean()
    elif world.case.loss is None:
        world.loss = lambda out: out.loss + out.logits.detach().pow(2).mean()
    else:
        raise Unfit("one output")


@named_move("an output changed in place")
def _output_in_place(world: World) -> None:
    before = world.loss
    if before is None or isinstance(world.model, loop_models.TwoHeads):
        raise Unfit("outputs in an object")
    world.loss = lambda out: before(out.mul_(2.0))


@named_move("a loss that is scaled")
def _scaled(world: World) -> None:
    before = world.loss
    world.loss = lambda out: 128.0 * (before(out) if before is not None else out.loss)
