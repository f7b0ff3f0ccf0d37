"""Take a model's output apart into tensors, and put it together from others.

Known containers go through torch's pytree. Any other object that holds tensors
(a key-value cache, say) is copied with the new tensors in the old one's places.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_unflatten


@dataclass(frozen=True)
class OutputTemplate:
    """How to rebuild an output from its tensors.

    ``leaves`` are pytree leaves; ``slots[i]`` is the index of leaf ``i``'s
    tensor, a dict from ids to indices for an opaque object, or ``None`` for a
    constant. ``names`` are the tensors' places in the output, for messages.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    slots: tuple[int | dict[int, int] | None, ...]
    names: tuple[str, ...]

    def build(self, tensors: list[torch.Tensor]) -> Any:
        """The output with ``tensors`` in place of the ones it was made from."""
        rebuilt = []
        for leaf, slot in zip(self.leaves, self.slots, strict=True):
            if slot is None:
                rebuilt.append(leaf)
            elif isinstance(slot, int):
                rebuilt.append(tensors[slot])
            else:
                memo = {key: tensors[i] for key, i in slot.items()}
                rebuilt.append(copy.deepcopy(leaf, memo))
        return tree_unflatten(rebuilt, self.spec)


def take_apart(output: Any) -> tuple[OutputTemplate, list[torch.Tensor]]:
    """The template of ``output`` and its tensors, each once."""
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    index_of: dict[int, int] = {}

    def index(tensor: torch.Tensor, name: str) -> int:
        if id(tensor) not in index_of:
            index_of[id(tensor)] = len(tensors)
            tensors.append(tensor)
            names.append(name)
        return index_of[id(tensor)]

    leaves, spec = tree_flatten_with_path(output)
    kept: list[Any] = []
    slots: list[int | dict[int, int] | None] = []
    for path, leaf in leaves:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        if isinstance(leaf, torch.Tensor):
            slots.append(index(leaf, name or "output"))
            kept.append(None)
        else:
            held = tensors_within(leaf)
            slots.append({id(t): index(t, name or "output") for t in held} if held else None)
            kept.append(leaf)
    return OutputTemplate(spec, tuple(kept), tuple(slots), tuple(names)), tensors


def tensors_within(value: Any) -> list[torch.Tensor]:
    """Tensors that an object holds, at any depth; modules are not looked into."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, torch.nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            todo.extend(item)
        elif hasattr(item, "__dict__"):
            todo.extend(vars(item).values())
    return found


def find_loss(output: Any) -> torch.Tensor | None:
    """The scalar that training differentiates: the output itself or its attribute ``loss``."""
    candidate = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    if isinstance(candidate, torch.Tensor) and candidate.numel() == 1 and candidate.requires_grad:
        return candidate
    return None
