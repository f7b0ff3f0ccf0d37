"""Parts, parameters and buffers of a model, changed between steps."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from . import loop_models
from .loop_side import LoopSide, Unfit, named_move, needs


def _owner(side: LoopSide) -> tuple[nn.Module, str]:
    path, _, name = side.case.hooked.rpartition(".")
    return side.part(path), name


@named_move("a layer, replaced by an equal one")
def _layer_replaced(side: LoopSide) -> None:
    owner, name = _owner(side)
    torch.manual_seed(77)
    setattr(owner, name, copy.deepcopy(getattr(owner, name)))


@named_move("a layer, wrapped")
def _layer_wrapped(side: LoopSide) -> None:
    owner, name = _owner(side)
    setattr(owner, name, nn.Sequential(getattr(owner, name), nn.Tanh()))


@named_move("a module nobody calls")
def _module_added(side: LoopSide) -> None:
    torch.manual_seed(78)
    side.model.add_module("extra", nn.Linear(3, 3))


@named_move("frozen layer")
def _freeze(side: LoopSide) -> None:
    side.part(side.case.hooked).requires_grad_(False)


@named_move("unfrozen")
def _unfreeze(side: LoopSide) -> None:
    side.model.requires_grad_(True)


@named_move("a part in eval mode")
def _part_eval(side: LoopSide) -> None:
    side.part(side.case.dropout or side.case.norm).eval()


@named_move("a whole part in eval mode, and back")
def _eval_and_back(side: LoopSide) -> None:
    side.model.eval()
    side.model.train()


@named_move("a buffer, in place")
def _buffer(side: LoopSide) -> None:
    buffer = next((b for b in side.model.buffers() if b.is_floating_point()), None)
    if buffer is None:
        raise Unfit("no buffer")
    buffer.add_(0.5)


@named_move("a buffer, replaced")
def _buffer_new(side: LoopSide) -> None:
    needs(side.model, "shift")
    side.model.shift = torch.full((64,), 0.3)


@named_move("a parameter, in place")
def _parameter(side: LoopSide) -> None:
    with torch.no_grad():
        next(side.model.parameters()).mul_(0.9)


@named_move("a parameter's data, replaced")
def _parameter_data(side: LoopSide) -> None:
    parameter = next(side.model.parameters())
    parameter.data = parameter.data * 1.1


@named_move("a parameter, replaced")
def _parameter_new(side: LoopSide) -> None:
    owner = side.part(side.case.hooked)
    if not isinstance(getattr(owner, "weight", None), nn.Parameter):
        raise Unfit("no weight")
    owner.weight = nn.Parameter(owner.weight.detach() * 0.5)


@named_move("weights tied")
def _tied(side: LoopSide) -> None:
    if isinstance(side.model, loop_models.Configured):
        side.model.layers[2].weight = side.model.layers[0].weight
    else:
        raise Unfit("nothing to tie")


@named_move("a state dict, loaded")
def _state_dict(side: LoopSide) -> None:
    stream = io.BytesIO()
    torch.save(side.model.state_dict(), stream)
    stream.seek(0)
    side.model.load_state_dict(torch.load(stream))


@named_move("a state dict, assigned")
def _state_assigned(side: LoopSide) -> None:
    state = {k: v.clone() for k, v in side.model.state_dict().items()}
    side.model.load_state_dict(state, assign=True)


@named_move("double precision")
def _double(side: LoopSide) -> None:
    side.model.double()
    before = side.change_sample
    side.change_sample = lambda s: {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in before(s).items()
    }


@named_move("half of the parameters in bfloat16")
def _half(side: LoopSide) -> None:
    side.part(side.case.hooked).bfloat16()


@named_move("channels last")
def _channels_last(side: LoopSide) -> None:
    if not isinstance(side.model, loop_models.Convolutions):
        raise Unfit("no pictures")
    side.model.to(memory_format=torch.channels_last)


@named_move("pruned")
def _pruned(side: LoopSide) -> None:
    from torch.nn.utils import prune

    layer = side.part(side.case.hooked)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise Unfit("no weight")
    prune.l1_unstructured(layer, "weight", amount=0.3)


@named_move("parametrized")
def _parametrized(side: LoopSide) -> None:
    layer = side.part(side.case.hooked)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise Unfit("no weight")
    nn.utils.parametrizations.weight_norm(layer)
