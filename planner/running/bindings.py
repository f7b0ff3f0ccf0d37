"""Where a planned step reads its inputs from a module, and where it stores results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from graph_capture.private_torch.modules import buffers_of, parameters_of
from graph_capture.recording.effects import LeftValue
from graph_capture.tracing.traced_step import Reassigned

from .autograd_nodes import (
    NotPlanned,
    anchor,
)

Fetch = Callable[[list[torch.Tensor]], torch.Tensor]
_Table = dict[str, Any]


def fetch_of(node: Node, model: nn.Module, constants: Mapping[str, torch.Tensor]) -> Fetch:
    """Return how to read an input of the step when it is called."""
    role, target = node.meta["role"], node.meta["target"]
    if role == "input":
        place = int(target)
        return lambda given: given[place]
    if role == "constant":
        tensor = constants[target]
        return lambda _given: tensor
    table, name = _place(target, role, model)
    return lambda _given: table[name]


def put_back_of(entry: Reassigned, model: nn.Module) -> Callable[[list[torch.Tensor]], None]:
    """Return how to set a buffer or an attribute to what forward made of it."""
    table, name = _place(entry.target, entry.role, model)

    def replace(outputs: list[torch.Tensor]) -> None:
        table[name] = outputs[entry.output]

    def replace_in_graph(outputs: list[torch.Tensor]) -> None:
        table[name] = NotPlanned.apply(outputs[entry.output], anchor(), entry.target)

    def exchange(outputs: list[torch.Tensor]) -> None:
        table[name].data = outputs[entry.output]

    def replace_by_number(outputs: list[torch.Tensor]) -> None:
        table[name] = outputs[entry.output].item()

    if entry.is_number:
        return replace_by_number
    if entry.requires_grad:
        return replace_in_graph
    return exchange if entry.keeps_object else replace


def leave_of(entry: LeftValue, model: nn.Module) -> Callable[[], None]:
    """Return how to set an attribute to what forward puts there."""
    table, name = _place(entry.target, "attribute", model)

    def leave() -> None:
        table[name] = copy.deepcopy(entry.value)

    return leave


def _place(target: str, role: str, model: nn.Module) -> tuple[_Table, str]:
    path, _, name = target.rpartition(".")
    owner = model.get_submodule(path)
    if role == "attribute":
        return vars(owner), name
    return (parameters_of(owner) if role == "parameter" else buffers_of(owner)), name
