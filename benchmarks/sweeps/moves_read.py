"""Changes between steps of what forward reads besides its arguments."""

from __future__ import annotations

from typing import Any

import torch

from . import loop_models
from .loop_side import MOVES, LoopSide, Unfit, named_move, needs, there


def _attribute(label: str, name: str, value: Any) -> None:
    def change(side: LoopSide) -> None:
        needs(side.model, name)
        setattr(side.model, name, value)

    MOVES[label] = change


_attribute("a number", "temperature", 2.0)
_attribute("the same number again", "temperature", 1.0)
_attribute("an activation", "activation", torch.tanh)
_attribute("a flag", "skip", False)
_attribute("a list, replaced", "factors", [2.0, 3.0])
_attribute("a dict, replaced", "options", {"bias": 1.5})


@named_move("dropout's p")
def _dropout_p(side: LoopSide) -> None:
    side.part(there(side.case.dropout)).p = 0.5


@named_move("dropout's p to zero")
def _dropout_zero(side: LoopSide) -> None:
    side.part(there(side.case.dropout)).p = 0.0


@named_move("a norm's eps")
def _norm_eps(side: LoopSide) -> None:
    side.part(there(side.case.norm)).eps = 0.1


@named_move("batch norm's momentum")
def _momentum(side: LoopSide) -> None:
    norm = side.part(there(side.case.norm))
    needs(norm, "momentum")
    norm.momentum = 0.5


@named_move("batch norm's momentum to None")
def _momentum_none(side: LoopSide) -> None:
    norm = side.part(there(side.case.norm))
    needs(norm, "momentum")
    norm.momentum = None


@named_move("batch norm stops tracking")
def _stops_tracking(side: LoopSide) -> None:
    norm = side.part(there(side.case.norm))
    needs(norm, "track_running_stats")
    norm.track_running_stats = False


@named_move("a list's element")
def _list_element(side: LoopSide) -> None:
    needs(side.model, "factors")
    side.model.factors[0] = 3.0


@named_move("a dict's element")
def _dict_element(side: LoopSide) -> None:
    needs(side.model, "options")
    side.model.options["bias"] = 2.0


@named_move("a plain tensor, in place")
def _plain_tensor(side: LoopSide) -> None:
    needs(side.model, "offset")
    side.model.offset.add_(1.0)


@named_move("a plain tensor, replaced")
def _plain_tensor_new(side: LoopSide) -> None:
    needs(side.model, "offset")
    side.model.offset = torch.full((64,), 0.7)


@named_move("a global")
def _global(side: LoopSide) -> None:
    if not isinstance(side.model, loop_models.Perceptron):
        raise Unfit("no global")
    loop_models.GLOBAL_SCALE = 2.0


@named_move("a class attribute")
def _class_attribute(side: LoopSide) -> None:
    needs(side.model, "class_scale")
    type(side.model).class_scale = 2.0  # type: ignore[attr-defined]


@named_move("a configuration's number")
def _config(side: LoopSide) -> None:
    needs(side.model, "config")
    needs(side.model.config, "scale")
    side.model.config.scale = 2.0


@named_move("a configuration's nested number")
def _config_nested(side: LoopSide) -> None:
    needs(side.model, "config")
    needs(side.model.config, "inner")
    side.model.config.inner.power = 2.0


@named_move("a configuration's flag")
def _config_flag(side: LoopSide) -> None:
    needs(side.model, "config")
    if hasattr(side.model.config, "clip"):
        side.model.config.clip = True
    else:
        side.model.config.output_hidden_states = True


@named_move("a configuration, replaced")
def _config_new(side: LoopSide) -> None:
    if not isinstance(side.model, loop_models.Configured):
        raise Unfit("no configuration of one's own")
    side.model.config = loop_models.Settings(rate=0.3)


@named_move("an attribute nobody reads")
def _unread(side: LoopSide) -> None:
    side.model.note = "epoch 3"


@named_move("a layer's method")
def _method(side: LoopSide) -> None:
    layer = side.part(side.case.hooked)
    before = layer.forward
    layer.forward = lambda *a, **k: before(*a, **k) * 2.0  # type: ignore[method-assign]
