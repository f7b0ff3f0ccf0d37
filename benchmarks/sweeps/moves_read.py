"""What forward reads beside its arguments, changed between steps."""

from __future__ import annotations

from typing import Any

import torch

from . import loop_models
from .world import MOVES, Unfit, World, named_move, needs, there


def _attribute(label: str, name: str, value: Any) -> None:
    def change(world: World) -> None:
        needs(world.model, name)
        setattr(world.model, name, value)

    MOVES[label] = change


_attribute("a number", "temperature", 2.0)
_attribute("the same number again", "temperature", 1.0)
_attribute("an activation", "activation", torch.tanh)
_attribute("a flag", "skip", False)
_attribute("a list, replaced", "factors", [2.0, 3.0])
_attribute("a dict, replaced", "options", {"bias": 1.5})


@named_move("dropout's p")
def _dropout_p(world: World) -> None:
    world.part(there(world.case.dropout)).p = 0.5


@named_move("dropout's p to zero")
def _dropout_zero(world: World) -> None:
    world.part(there(world.case.dropout)).p = 0.0


@named_move("a norm's eps")
def _norm_eps(world: World) -> None:
    world.part(there(world.case.norm)).eps = 0.1


@named_move("batch norm's momentum")
def _momentum(world: World) -> None:
    norm = world.part(there(world.case.norm))
    needs(norm, "momentum")
    norm.momentum = 0.5


@named_move("batch norm's momentum to None")
def _momentum_none(world: World) -> None:
    norm = world.part(there(world.case.norm))
    needs(norm, "momentum")
    norm.momentum = None


@named_move("batch norm stops tracking")
def _stops_tracking(world: World) -> None:
    norm = world.part(there(world.case.norm))
    needs(norm, "track_running_stats")
    norm.track_running_stats = False


@named_move("a list's element")
def _list_element(world: World) -> None:
    needs(world.model, "factors")
    world.model.factors[0] = 3.0


@named_move("a dict's element")
def _dict_element(world: World) -> None:
    needs(world.model, "options")
    world.model.options["bias"] = 2.0


@named_move("a plain tensor, in place")
def _plain_tensor(world: World) -> None:
    needs(world.model, "offset")
    world.model.offset.add_(1.0)


@named_move("a plain tensor, replaced")
def _plain_tensor_new(world: World) -> None:
    needs(world.model, "offset")
    world.model.offset = torch.full((64,), 0.7)


@named_move("a global")
def _global(world: World) -> None:
    if not isinstance(world.model, loop_models.Perceptron):
        raise Unfit("no global")
    loop_models.GLOBAL_SCALE = 2.0


@named_move("a class attribute")
def _class_attribute(world: World) -> None:
    needs(world.model, "class_scale")
    type(world.model).class_scale = 2.0  # type: ignore[attr-defined]


@named_move("a configuration's number")
def _config(world: World) -> None:
    needs(world.model, "config")
    needs(world.model.config, "scale")
    world.model.config.scale = 2.0


@named_move("a configuration's nested number")
def _config_nested(world: World) -> None:
    needs(world.model, "config")
    needs(world.model.config, "inner")
    world.model.config.inner.power = 2.0


@named_move("a configuration's flag")
def _config_flag(world: World) -> None:
    needs(world.model, "config")
    if hasattr(world.model.config, "clip"):
        world.model.config.clip = True
    else:
        world.model.config.output_hidden_states = True


@named_move("a configuration, replaced")
def _config_new(world: World) -> None:
    if not isinstance(world.model, loop_models.Configured):
        raise Unfit("no configuration of one's own")
    world.model.config = loop_models.Settings(rate=0.3)


@named_move("an attribute nobody reads")
def _unread(world: World) -> None:
    world.model.note = "epoch 3"


@named_move("a layer's method")
def _method(world: World) -> None:
    layer = world.part(world.case.hooked)
    before = layer.forward
    layer.forward = lambda *a, **k: before(*a, **k) * 2.0  # type: ignore[method-assign]
