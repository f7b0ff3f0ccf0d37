"""What a step was found to read, run and name while it was traced, each kind in its place."""

from __future__ import annotations

import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .asked_attributes import AskedAttributes
from .clocks import ClocksMet
from .foreign_generators import ForeignGenerators
from .foreign_names import ForeignObjects
from .ledger import Ledger
from .modules_met import ModulesMet
from .reads import Where


@dataclass(kw_only=True, eq=False)
class Met:
    """What has been met so far. Ids are keys, since objects may compare equal.

    Parameters
    ----------
    root
        The model.
    name_of
        Paths of modules and of objects.
    objects
        Arguments other than tensors.
    noted
        Attributes that were read, each with its holder; ``None`` where forward itself had
        put it there.
    own_before
        What modules held before the step.
    named
        What functions name and where it lies, as for ``place_of``.
    tables
        The dicts of classes, of which each look makes a new view.
    seen
        Functions, codes and objects, kept alive.
    ran
        Codes that ran, each with the globals of its function.
    caches
        Functions under ``functools.lru_cache``.
    words, strings
        Names that occur in the functions, and identifiers that occur in them as strings.
    asked_for_all
        What was asked for its attributes by ``vars()`` or ``__dict__``, and by which code.
    past_watching
        Functions that read by ``object.__getattribute__``.
    unwatchable
        Classes whose ``__getattribute__`` cannot be replaced.
    chains
        Names in files that are not the user's, the attributes that follow them, and the
        strings of the function.
    stands_for, of_call
        By the id of a stand-in, the model's or the call's tensor.
    replaceable
        Attributes whose tensors are inputs of the step.
    abstract
        Whether an abstract class was met, with which others register.
    decimals
        Whether the step may compute with decimal numbers, which ask for their context.
    thread
        The one that traces; others train models of their own.
    outside
        What closures, globals and objects that were met held.
    """

    root: nn.Module
    name_of: dict[int, str]
    objects: Sequence[Any]
    noted: dict[tuple[int, str], tuple[Any, str]] = field(default_factory=dict)
    own_before: dict[int, dict[str, Any]] = field(default_factory=dict)
    named: dict[tuple[int, str], tuple[str, Where, Any, str]] = field(default_factory=dict)
    tables: dict[type, Any] = field(default_factory=dict)
    seen: dict[int, Any] = field(default_factory=dict)
    ran: dict[int, tuple[types.CodeType, dict[str, Any]]] = field(default_factory=dict)
    caches: dict[int, Any] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)
    asked_for_all: dict[tuple[int, int], tuple[Any, types.CodeType]] = field(default_factory=dict)
    past_watching: dict[int, types.CodeType] = field(default_factory=dict)
    unwatchable: set[type] = field(default_factory=set)
    chains: list[tuple[types.ModuleType, tuple[str, ...], frozenset[str]]] = field(
        default_factory=list
    )
    stands_for: dict[int, torch.Tensor] = field(default_factory=dict)
    of_call: dict[int, torch.Tensor] = field(default_factory=dict)
    replaceable: set[str] = field(default_factory=set)
    abstract: bool = False
    decimals: bool = False
    thread: int = field(default_factory=threading.get_ident)
    outside: Ledger = field(default_factory=Ledger)
    foreign: ForeignObjects = field(default_factory=ForeignObjects)
    modules: ModulesMet = field(init=False)
    generators: ForeignGenerators = field(default_factory=ForeignGenerators)
    clocks: ClocksMet = field(default_factory=ClocksMet)
    attributes: AskedAttributes = field(default_factory=AskedAttributes)

    def __post_init__(self) -> None:
        self.modules = ModulesMet(self.outside.names, self.foreign.meet_file)

    def path(self, holder: Any, name: str) -> str:
        """An attribute in words."""
        path = self.name_of.get(id(holder), type(holder).__name__)
        return f"{path}.{name}" if path else name

    def table(self, cls: type) -> Any:
        """The dict of a class, the same each time."""
        return self.tables.setdefault(cls, vars(cls))


__all__ = ["Met"]
