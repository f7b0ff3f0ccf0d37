"""Other calls of a model, and other uses of its output."""

from __future__ import annotations

import torch
from torch import Tensor

from . import loop_models
from .loop_side import LoopSide, Unfit, named_move


@named_move("another batch")
def _batch(side: LoopSide) -> None:
    side.batch = 5


@named_move("the first batch size again")
def _batch_back(side: LoopSide) -> None:
    side.batch = loop_models.BATCH


@named_move("a strided input")
def _strided(side: LoopSide) -> None:
    side.change_sample = lambda s: {
        k: v.repeat_interleave(2, 0)[::2] if isinstance(v, Tensor) else v for k, v in s.items()
    }


@named_move("an input that requires grad")
def _input_grad(side: LoopSide) -> None:
    if side.case.loss is None:
        raise Unfit("tokens")
    side.change_sample = lambda s: {k: v.requires_grad_() for k, v in s.items()}


@named_move("a negated view as input")
def _negative(side: LoopSide) -> None:
    if side.case.loss is None:
        raise Unfit("tokens")
    side.change_sample = lambda s: {k: torch._neg_view(v) for k, v in s.items()}


@named_move("an argument more")
def _argument(side: LoopSide) -> None:
    if side.case.loss is None:
        side.change_sample = lambda s: {**s, "use_cache": False}
    else:
        side.change_sample = lambda s: {**s, "scale": 2.0}


@named_move("an argument at its default")
def _default_argument(side: LoopSide) -> None:
    if side.case.loss is None:
        raise Unfit("no default")
    side.change_sample = lambda s: {**s, "scale": 1.0}


@named_move("an attention mask")
def _mask(side: LoopSide) -> None:
    if side.case.loss is not None:
        raise Unfit("no text")
    side.change_sample = lambda s: {**s, "attention_mask": torch.ones_like(s["input_ids"])}


@named_move("inputs in float16 values")
def _rounded(side: LoopSide) -> None:
    side.change_sample = lambda s: {
        k: v.half().float() if v.is_floating_point() else v for k, v in s.items()
    }


@named_move("autocast on")
def _autocast(side: LoopSide) -> None:
    side.autocast = True


@named_move("autocast off")
def _autocast_off(side: LoopSide) -> None:
    side.autocast = False


@named_move("another loss")
def _other_loss(side: LoopSide) -> None:
    if isinstance(side.model, loop_models.TwoHeads):
        side.loss = lambda out: out.main.abs().mean()
    elif side.case.loss is None:
        side.loss = lambda out: out.loss * 2.0
    else:
        side.loss = lambda out: out.abs().mean()


@named_move("outputs that were not planned as differentiated")
def _detached(side: LoopSide) -> None:
    if isinstance(side.model, loop_models.TwoHeads):
        side.loss = lambda out: out.main.pow(2).mean() + out.side.pow(2).mean()
    elif side.case.loss is None:
        side.loss = lambda out: out.loss + 0.1 * out.logits.pow(2).mean()
    else:
        raise Unfit("one output")


@named_move("only an output that was not planned as differentiated")
def _only_detached(side: LoopSide) -> None:
    if isinstance(side.model, loop_models.TwoHeads):
        side.loss = lambda out: out.side.pow(2).mean()
    elif side.case.loss is None:
        side.loss = lambda out: out.logits.pow(2).mean()
    else:
        raise Unfit("one output")


@named_move("a detached output, read")
def _detached_read(side: LoopSide) -> None:
    if isinstance(side.model, loop_models.TwoHeads):
        side.loss = lambda out: out.main.pow(2).mean() + out.side.detach().pow(2).mean()
    elif side.case.loss is None:
        side.loss = lambda out: out.loss + out.logits.detach().pow(2).mean()
    else:
        raise Unfit("one output")


@named_move("an output changed in place")
def _output_in_place(side: LoopSide) -> None:
    before = side.loss
    if before is None or isinstance(side.model, loop_models.TwoHeads):
        raise Unfit("outputs in an object")
    side.loss = lambda out: before(out.mul_(2.0))


@named_move("a loss that is scaled")
def _scaled(side: LoopSide) -> None:
    before = side.loss
    side.loss = lambda out: 128.0 * (before(out) if before is not None else out.loss)
