"""Observe what a step reads besides its arguments while it is traced.

Reads of module attributes are seen because ``nn.Module.__getattribute__`` is replaced
during the trace. For other objects that are met (a configuration, a schedule), the
``__getattribute__`` of their classes is replaced (:mod:`~.watched_classes`). What is met is
looked into (:mod:`~.looking_into`), and so are all functions on the stack when an operator is
called. What functions of Python and PyTorch are asked is seen by :mod:`~.asked_elsewhere`.
"""

from __future__ import annotations

import gc
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import NotFittingError
from .asked_elsewhere import AskedElsewhere
from .function_caches import FunctionCaches
from .holders import dict_of, weakly
from .ledger import Change
from .looking_into import NAMESPACES, LookingInto
from .met import Met
from .methods_that_ran import note_methods
from .named_reads import is_users
from .process_wide import PROCESS_WIDE
from .read_places import IGNORED, read_places
from .reads import SETTINGS, Reads, Where, place_of, refuse_too_large
from .snapshots import ABSENT
from .watched_classes import put_back
from .whole_dicts import ALL_AT_ONCE, who_asks

_TABLES_OF_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks"))
_TABLES_FOR_ALL = tuple(
    table
    for name, table in vars(nn.modules.module).items()
    if name.startswith("_global_") and isinstance(table, dict)
)
_WITH_NAMES = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)


class Watcher:
    """Collects what is read while :meth:`watching`.

    Parameters
    ----------
    model
        Gives names to modules; its hooks and its forward are examined.
    forward
        The function that is called.
    objects
        Arguments other than tensors: objects with attributes, functions, arrays.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], objects: Iterable[Any] = ()
    ) -> None:
        names = {id(module): path for path, module in model.named_modules()}
        self._met = met = Met(root=model, name_of=names, objects=list(objects))
        self._into = LookingInto(met)
        self._forward = forward
        self._unresolved: list[types.CodeType] = []  # of functions whose closures are to be found
        self._written: set[tuple[int, str]] = set()
        self.outside = met.outside
        self.cached, self.caches = met.caches.values(), FunctionCaches()
        self.generators = met.generators
        self.clocks = met.clocks
        self.stands_for = met.stands_for
        self.of_call = met.of_call
        self.replaceable = met.replaceable
        self.settled: list[Change] = []  # what forward reads and changes once
        self.elsewhere = AskedElsewhere(
            self._runs,
            self._asked_for,
            self._asked_for_names,
            lambda value: met.stands_for.get(id(value), value),
            lambda value: met.foreign.meet_whole(value, type(value).__name__),
        )

    # -- while the step runs ---------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, reads are noted."""
        met, into = self._met, self._into
        for module in met.root.modules():
            met.own_before.setdefault(id(module), dict(vars(module)))
            into.remember_classes(type(module))
            for table in _TABLES_OF_HOOKS:
                into.meet(vars(module).get(table), "")
        for hooks in _TABLES_FOR_ALL:
            into.meet(hooks, "")
        into.meet(self._forward, "")
        for value in met.objects:
            into.meet(value, type(value).__name__)
        mine = vars(nn.Module).get("__getattribute__", ABSENT)
        setter = nn.Module.__setattr__
        note, ignored, written = into.note, IGNORED, self._written
        guarded = {id(module) for module in met.root.modules()}  # whose modes the call guard sees

        def setting(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == met.thread:
                written.add((id(module), name))
            setter(module, name, value)

        def watched(module: nn.Module, name: str) -> Any:
            if name not in ignored or (name == "training" and id(module) not in guarded):
                note(module, name)
            if name in ALL_AT_ONCE and (code := who_asks(sys._getframe(1))):
                into.asked_for_all(module, code)
            return super(nn.Module, module).__getattribute__(name)

        met.thread = threading.get_ident()
        with ExitStack() as undo:  # after an error, too
            undo.enter_context(into.classes.active(into))
            undo.callback(put_back, nn.Module, mine)
            undo.callback(setattr, nn.Module, "__setattr__", setter)
            nn.Module.__getattribute__ = watched  # type: ignore[method-assign, assignment]
            nn.Module.__setattr__ = setting  # type: ignore[method-assign, assignment]
            with self.elsewhere.watching(), met.attributes.of_stand_ins(self._asked_for):
                yield

    def was_read(self, module: nn.Module, name: str) -> bool:
        """Whether the step read an attribute's value from before the step."""
        return self._met.noted.get((id(module), name), (None, ""))[0] is not None

    def was_used(self, module: nn.Module, name: str) -> bool:
        """Whether the step read an attribute that it had set itself."""
        return self._met.noted.get((id(module), name), (module, ""))[0] is None

    def was_written(self, module: nn.Module, name: str) -> bool:
        """Whether the step set an attribute, even to the same value."""
        return (id(module), name) in self._written

    def look_at_stack(self, frame: types.FrameType | None, until: str) -> None:
        """Note the functions that run, from ``frame`` down to those of the file ``until``."""
        while frame is not None and frame.f_code.co_filename != until:
            self._runs(frame.f_code, frame.f_globals)
            frame = frame.f_back

    def _runs(self, code: types.CodeType, table: dict[str, Any]) -> None:
        """Note a function that runs."""
        self._met.ran.setdefault(id(code), (code, table))
        if id(code) not in self._met.seen:
            self._met.seen[id(code)] = code
            if is_users(code):
                self._into.names(code, table, None)
                file = sys.modules.get(table.get("__name__") or "")
                if file is not None and vars(file) is not table:  # exec, with a copy of its names
                    self._into.names(code, vars(file), None)
                if set(code.co_freevars) - {"__class__"}:
                    self._unresolved.append(code)

    def let_stand_for(self, twin: torch.Tensor, tensor: torch.Tensor) -> None:
        """Note that a stand-in is in the place of a tensor of the model."""
        self._met.stands_for[id(twin)] = tensor
        for name, value in vars(tensor).items():
            self._into.meet(value, name)

    def _asked_for(self, holder: Any, name: str) -> None:
        """Note what ``getattr`` or ``hasattr`` is asked for, of what is not watched."""
        if isinstance(holder, nn.Module):
            return
        if isinstance(holder, torch.Tensor):
            if name in dict_of(self._met.of_call.get(id(holder))):
                raise NotFittingError(
                    f"forward reads {name!r}, which somebody has put on a tensor of the call: a "
                    "plan does not look for attributes of the tensors that it is called with. "
                    "Pass the value as an argument of its own"
                )
            if id(holder) in self._met.stands_for:
                self._met.attributes.note(
                    self._met.stands_for[id(holder)], name, "a tensor of the model"
                )
            return
        named = isinstance(holder, _WITH_NAMES)  # of others, __getattr__ may do anything
        path = holder.__name__ if named else type(holder).__name__
        self._into.meet(holder, path)
        if isinstance(holder, types.MethodType):
            holder = holder.__func__
        if type(holder) in self._into.classes:
            return
        self._met.attributes.note(holder, name, path)
        if isinstance(holder, (types.FunctionType, *NAMESPACES)):
            self._into.meet(vars(holder).get(name), f"{path}.{name}")

    def _asked_for_names(self, holder: Any) -> None:
        if isinstance(holder, type):
            self._met.attributes.note_names(holder)

    # -- afterwards ----------------------------------------------------------------

    def reads(self) -> Reads:
        """Return what was read, with its values at the end of the trace."""
        met = self._met
        for function in _functions_with(self._unresolved):
            self._into.names(function.__code__, function.__globals__, function)
        for function in note_methods(met):
            self._into.parts(function)
        places = read_places(met)
        if met.decimals:
            self.elsewhere.note_decimals()
        if met.abstract and met.words & {"isinstance", "issubclass"}:
            self.elsewhere.note_registered_classes()
        places += self.elsewhere.places()
        places.append(place_of(SETTINGS, Where.ATTRIBUTE, weakly(PROCESS_WIDE), "settings"))
        refuse_too_large(places)
        return Reads(places)


def _functions_with(codes: list[types.CodeType]) -> list[types.FunctionType]:
    """Return the functions that have one of these codes, each of which may have other cells.

    The garbage collector knows them, but does not look among what a process has frozen
    (``gc.freeze``), so that is undone. Freezing it again would keep this capture for ever.
    """
    if not codes:
        return []
    gc.unfreeze()
    known = {id(code) for code in codes}
    return [
        holder
        for holder in gc.get_referrers(*codes)
        if isinstance(holder, types.FunctionType) and id(holder.__code__) in known
    ]
