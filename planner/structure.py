"""The objects that a module is built of: whether a graph traced from it still is its graph."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

_Slot = tuple[weakref.ref[nn.Module], str]  # a module and a name among its parameters or buffers


@dataclass(frozen=True, slots=True)
class Structure:
    """Modules by their identity, and which tensors are one under several names.

    Parameters
    ----------
    modules
        Each module with its children, in order.
    tied
        Pairs of places that hold the same parameter or buffer.
    """

    modules: tuple[tuple[weakref.ref[nn.Module], tuple[weakref.ref[nn.Module] | None, ...]], ...]
    tied: tuple[tuple[_Slot, _Slot], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Remember how ``model`` is built; holds none of it alive."""
        modules, tied = [], []
        first: dict[int, _Slot] = {}
        for module in model.modules():
            children = module._modules.values()
            modules.append(
                (
                    weakref.ref(module),
                    tuple(None if c is None else weakref.ref(c) for c in children),
                )
            )
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    slot = (weakref.ref(module), name)
                    if first.setdefault(id(tensor), slot) is not slot:
                        tied.append((first[id(tensor)], slot))
        return cls(tuple(modules), tuple(tied))

    def holds(self) -> bool:
        """Whether no module was replaced, added or removed and no tie was cut since."""
        for reference, children in self.modules:
            module = reference()
            if module is None or len(module._modules) != len(children):
                return False
            for now, then in zip(module._modules.values(), children, strict=True):
                if now is not (None if then is None else then()):
                    return False
        return all(_at(a) is _at(b) for a, b in self.tied)


def _at(slot: _Slot) -> object:
    reference, name = slot
    module = reference()
    if module is None:
        return None
    return module._parameters.get(name, module._buffers.get(name))
