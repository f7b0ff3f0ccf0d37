"""Parts, parameters and buffers of a model, changed between steps."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from . import loop_models
from .world import Unfit, World, named_move, needs


def _owner(world: World) -> tuple[nn.Module, str]:
    path, _, name = world.case.hooked.rpartition(".")
    return world.part(path), name


@named_move("a layer, replaced by an equal one")
def _layer_replaced(world: World) -> None:
    owner, name = _owner(world)
    torch.manual_seed(77)
    setattr(owner, name, copy.deepcopy(getattr(owner, name)))


@named_move("a layer, wrapped")
def _layer_wrapped(world: World) -> None:
    owner, name = _owner(world)
    setattr(owner, name, nn.Sequential(getattr(owner, name), nn.Tanh()))


@named_move("a module nobody calls")
def _module_added(world: World) -> None:
    torch.manual_seed(78)
    world.model.add_module("extra", nn.Linear(3, 3))


@named_move("frozen layer")
def _freeze(world: World) -> None:
    world.part(world.case.hooked).requires_grad_(False)


@named_move("unfrozen")
def _unfreeze(world: World) -> None:
    world.model.requires_grad_(True)


@named_move("a part in eval mode")
def _part_eval(world: World) -> None:
    world.part(world.case.dropout or world.case.norm).eval()


@named_move("a whole part in eval mode, and back")
def _eval_and_back(world: World) -> None:
    world.model.eval()
    world.model.train()


@named_move("a buffer, in place")
def _buffer(world: World) -> None:
    buffer = next((b for b in world.model.buffers() if b.is_floating_point()), None)
    if buffer is None:
        raise Unfit("no buffer")
    buffer.add_(0.5)


@named_move("a buffer, replaced")
def _buffer_new(world: World) -> None:
    needs(world.model, "shift")
    world.model.shift = torch.full((64,), 0.3)


@named_move("a parameter, in place")
def _parameter(world: World) -> None:
    with torch.no_grad():
        next(world.model.parameters()).mul_(0.9)


@named_move("a parameter's data, replaced")
def _parameter_data(world: World) -> None:
    parameter = next(world.model.parameters())
    parameter.data = parameter.data * 1.1


@named_move("a parameter, replaced")
def _parameter_new(world: World) -> None:
    owner = world.part(world.case.hooked)
    if not isinstance(getattr(owner, "weight", None), nn.Parameter):
        raise Unfit("no weight")
    owner.weight = nn.Parameter(owner.weight.detach() * 0.5)


@named_move("weights tied")
def _tied(world: World) -> None:
    if isinstance(world.model, loop_models.Configured):
        world.model.layers[2].weight = world.model.layers[0].weight
    else:
        raise Unfit("nothing to tie")


@named_move("a state dict, loaded")
def _state_dict(world: World) -> None:
    stream = io.BytesIO()
    torch.save(world.model.state_dict(), stream)
    stream.seek(0)
    world.model.load_state_dict(torch.load(stream))


@named_move("a state dict, assigned")
def _state_assigned(world: World) -> None:
    state = {k: v.clone() for k, v in world.model.state_dict().items()}
    world.model.load_state_dict(state, assign=True)


@named_move("double precision")
def _double(world: World) -> None:
    world.model.double()
    before = world.change_sample
    world.change_sample = lambda s: {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in before(s).items()
    }


@named_move("half of the parameters in bfloat16")
def _half(world: World) -> None:
    world.part(world.case.hooked).bfloat16()


@named_move("channels last")
def _channels_last(world: World) -> None:
    if not isinstance(world.model, loop_models.Convolutions):
        raise Unfit("no pictures")
    world.model.to(memory_format=torch.channels_last)


@named_move("pruned")
def _pruned(world: World) -> None:
    from torch.nn.utils import prune

    layer = world.part(world.case.hooked)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise Unfit("no weight")
    prune.l1_unstructured(layer, "weight", amount=0.3)


@named_move("parametrized")
def _parametrized(world: World) -> None:
    layer = world.part(world.case.hooked)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise Unfit("no weight")
    nn.utils.parametrizations.weight_norm(layer)
