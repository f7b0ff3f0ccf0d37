"""Write down the calls of a step that runs for real, and how long each memory lives.

For what cannot run on stand-ins: a value decides a branch, a shape depends on values, code
outside of PyTorch reads them. Nothing is repeated or moved in such a part, so all that is
needed of it is which memory is there at each moment. Memory is followed by weak references
to its storage: it counts for as long as anything really holds it, Python's local variables
and what autograd saves included.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..calls.call_places import CallPlaces, calling_line
from ..calls.draws import draws_now
from ..calls.layouts import refuse_nesting
from ..calls.storage_id import storage_id
from ..calls.writes import hidden_writes, written_arguments
from ..costs.allocator import peak_extra_bytes, peak_extra_bytes_on_card
from ..costs.cost_model import Call
from ..errors import CaptureError
from ..loop.memory_meter import shapes_of
from ..private_torch.aten import index_put_impl
from ..private_torch.autograd import current_node
from ..private_torch.dispatch import TorchDispatchMode, disable_current_modes
from ..private_torch.operators import OpOverload, schema_of
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter

_LIFTED = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}
_INDEX_PUT = torch.ops.aten.index_put.default
_INDEX_PUT_IN_PLACE = index_put_impl.default
_NUMBER_BYTES = 16  # of the largest kind, complex
_BY_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@dataclass(slots=True, kw_only=True)
class Memory:
    """A block of memory that the step has met.

    Parameters
    ----------
    name
        Unique in the step.
    size_bytes
        The most that it had.
    device_type
        Where it lies.
    role
        ``"parameter"``, ``"buffer"``, ``"input"``, ``"gradient"`` (of an earlier backward
        pass) or ``"constant"`` for what was there before; ``None`` for what the step makes.
    maker
        Index of the call that makes it.
    last
        Index of the last call after which it was still there; ``None`` for the step's end.
    writers
        Later calls that write to it.
    """

    name: str
    size_bytes: int
    device_type: str
    role: str | None = None
    maker: int | None = None
    last: int | None = None
    writers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RealCall:
    """A call of the step.

    Parameters
    ----------
    name
        Unique in the step.
    target
        What is called.
    given, made
        The memory of each tensor that it was given, and of each that it made.
    call
        For its price; ``None`` for what stands for other calls.
    scratch_bytes
        Measured while it ran; ``None`` where it can run on made-up values instead.
    phase, module_path, source
        Where it comes from.
    number
        Of the call of a module that it stands for.
    """

    name: str
    target: str
    given: tuple[int, ...]
    made: tuple[int, ...]
    call: Call | None = None
    scratch_bytes: int | None = None
    phase: str = "forward"
    module_path: str = ""
    source: str = ""
    number: int | None = None


class RealCalls(TorchDispatchMode):
    """Writes down what is dispatched while it is active.

    Parameters
    ----------
    torch_type
        The device type of the step.
    """

    def __init__(self, torch_type: str) -> None:
        super().__init__()
        self._torch_type = torch_type
        self.calls: list[RealCall] = []
        self.memory: list[Memory] = []
        self.phase = "forward"
        self.number_bytes = 0  # of numbers in place of tensors, which autograd may save
        self._learned: set[int] = set()  # memory that parameters or draws contribute to
        self._at: dict[int, int] = {}  # identity of a storage -> its memory
        self._places = CallPlaces()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._over = False

    # -- memory --------------------------------------------------------------

    def there(self, tensor: torch.Tensor, name: str, role: str) -> int:
        """Declare a tensor that was there before the step; return its memory."""
        at = self._at.get(storage_id(tensor))
        return self._new(tensor, name, role=role) if at is None else at

    def memory_of(self, tensor: torch.Tensor) -> int:
        """Return the memory of a tensor; one that nobody has seen was there before."""
        _refuse_undense(tensor)
        return self.there(tensor, f"constant_{len(self.memory)}", "constant")

    def is_computed(self, tensor: torch.Tensor) -> bool:
        """Whether parameters or random numbers have contributed to a tensor."""
        return self._at.get(storage_id(tensor)) in self._learned

    def _new(
        self, tensor: torch.Tensor, name: str, *, role: str | None = None, maker: int | None = None
    ) -> int:
        _refuse_undense(tensor)
        storage = tensor.untyped_storage()
        k = self._at[identity_of_storage(storage)] = len(self.memory)
        self.memory.append(
            Memory(
                name=name,
                size_bytes=storage.nbytes(),
                device_type=tensor.device.type,
                role=role,
                maker=maker,
            )
        )
        if role == "parameter":
            self._learned.add(k)
        # The interpreter holds finalizers; see memory_meter.py.
        weakref.finalize(
            storage, _freed, weakref.ref(self), identity_of_storage(storage), k
        ).atexit = False
        return k

    def _free(self, sid: int, k: int) -> None:
        if self._at.get(sid) == k:
            del self._at[sid]
        if not self._over and self.memory[k].role is None:
            self.memory[k].last = len(self.calls) - 1

    # -- calls ---------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            raise CaptureError(f"{func} cannot be recorded ({calling_line()})")
        refuse_nesting(func, calling_line)
        if func.namespace == "prim":  # a tensor is asked for its device
            return func(*args, **kwargs)
        if func is _INDEX_PUT and self.phase == "backward" and _of_index(current_node()):
            # Without a mode, eager adds to the zeros in place (index_backward in
            # torch/csrc/autograd/FunctionsManual.cpp).
            func, args = _INDEX_PUT_IN_PLACE, (*args[:3], True, True)
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        given = () if func in _LIFTED else tuple(map(self.memory_of, tensors))
        written = self.keep_written(func, args, kwargs)
        if self.phase == "forward" and torch.is_grad_enabled():
            self.number_bytes += _NUMBER_BYTES * _num_numbers(func, args)
        scratch_bytes = None
        if _BY_VALUES.isdisjoint(func.tags) and func is not _INDEX_PUT_IN_PLACE:
            out = func(*args, **kwargs)
        else:
            out, scratch_bytes = self._measured(func, args, kwargs)
        self._note(func, args, kwargs, given, out, written, scratch_bytes)
        return out

    def _note(
        self,
        func: OpOverload,
        args: tuple,
        kwargs: dict,
        given: tuple[int, ...],
        out: Any,
        written: Sequence[torch.Tensor],
        scratch_bytes: int | None,
    ) -> None:
        for tensor in written:  # resize_ and out= may have made it larger
            memory = self.memory[self.memory_of(tensor)]
            memory.size_bytes = max(memory.size_bytes, tensor.untyped_storage().nbytes())
            memory.writers.append(len(self.calls))
        results = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        base = f"{schema_of(func).name.split('::')[-1]}_{len(self.calls)}"
        made = self._made(results, base)
        if draws_now(func, args, kwargs) or not self._learned.isdisjoint(given):
            self._learned.update(made, map(self.memory_of, written))
        if not made and not written and results:
            return  # a view
        module_path, source = self._places.origin(self.phase)
        with disable_current_modes():  # a plain meta tensor is made at a tenth of the cost
            call = Call(
                func=func,
                args=shapes_of(args),
                kwargs=shapes_of(kwargs),
                out=shapes_of(out),
                grad_enabled=torch.is_grad_enabled(),
            )
        self.calls.append(
            RealCall(
                name=base,
                target=str(func),
                given=given,
                made=made,
                call=call,
                scratch_bytes=scratch_bytes,
                phase=self.phase,
                module_path=module_path,
                source=source,
            )
        )

    def stands(
        self,
        target: str,
        number: int,
        given: Sequence[torch.Tensor],
        made: Sequence[torch.Tensor],
        module_path: str,
    ) -> None:
        """Write down one call in place of all those that a module makes."""
        known = tuple(map(self.memory_of, given))
        name = f"{target.split('.')[1]}_{number}"
        self._learned.update(self._made(made, name))
        self.calls.append(
            RealCall(
                name=name,
                target=target,
                given=known,
                made=tuple(map(self.memory_of, made)),
                phase=self.phase,
                module_path=module_path,
                number=number,
            )
        )

    def turn(self, target: str, outputs: Sequence[torch.Tensor]) -> None:
        """Write down that the loop has its loss, and that backward begins."""
        given = tuple(map(self.memory_of, outputs))
        self.calls.append(RealCall(name="loss", target=target, given=given, made=(), phase="loss"))
        self.phase = "backward"

    def alive(self) -> frozenset[int]:
        """Return the memory that the step has made and that is still there."""
        return frozenset(k for k in self._at.values() if self.memory[k].role is None)

    def end(self) -> None:
        """Write down that the step has ended: what is freed from now on was held by the loop."""
        self._over = True

    def _made(self, results: Sequence[torch.Tensor], base: str) -> tuple[int, ...]:
        """The memory that a call has made."""
        made: list[int] = []
        for tensor in results:
            _refuse_undense(tensor)
            if storage_id(tensor) not in self._at:
                name = f"{base}_{len(made)}" if made else base
                made.append(self._new(tensor, name, maker=len(self.calls)))
        return tuple(made)

    def _measured(self, func: OpOverload, args: tuple, kwargs: dict) -> tuple[Any, int]:
        """Run a call that made-up values would lead elsewhere; return its result and scratch."""
        results: list[Any] = []

        def run() -> None:
            results.append(func(*args, **kwargs))

        device = next(
            (t.device for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)), None
        )
        if device is not None and device.type == "cuda":
            peak_bytes = peak_extra_bytes_on_card(run, device)
        else:
            peak_bytes = peak_extra_bytes(run)
        kept = {
            storage_id(t): t.untyped_storage().nbytes()
            for t in tree_iter(results)
            if isinstance(t, torch.Tensor) and storage_id(t) not in self._at
        }
        return results[0], max(0, peak_bytes - sum(kept.values()))

    # -- where calls come from, and what they change ---------------------------

    def inside_modules(self, model: nn.Module) -> Any:
        """While active, calls know the submodule that they run in."""
        return self._places.inside_modules(model)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While active, calls are not written down; what they change is put back all the same."""
        with disable_current_modes(), _Watching(self):
            yield

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Put back afterwards what calls wrote to memory that was there before."""
        try:
            yield
        finally:
            for storage, saved in self._before.values():
                storage.copy_(saved)
            self._before.clear()

    def keep_written(self, func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        """Keep what lies where a call writes, the first time; return what it writes to."""
        written = [*written_arguments(func, args, kwargs), *hidden_writes(func, args)]
        for tensor in written:
            sid = storage_id(tensor)
            at = self._at.get(sid)
            role = None if at is None else self.memory[at].role
            if role not in (None, "gradient") and sid not in self._before:
                storage = tensor.untyped_storage()
                with disable_current_modes():
                    self._before[sid] = storage, storage.clone()
        return written


class _Watching(TorchDispatchMode):
    """Keeps what is written to, and writes nothing down."""

    def __init__(self, calls: RealCalls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload):
            self._calls.keep_written(func, args, kwargs)
        return func(*args, **kwargs)


def _freed(calls: weakref.ref[RealCalls], sid: int, k: int) -> None:
    listening = calls()
    if listening is not None:
        listening._free(sid, k)


def _of_index(node: Any) -> bool:
    return node is not None and node.name() == "IndexBackward0"


def _num_numbers(func: OpOverload, args: tuple) -> int:
    """How many numbers a call has in places of tensors; PyTorch makes tensors of them first."""
    pairs = zip(args, schema_of(func).arguments, strict=False)
    return sum(isinstance(x, (int, float, complex)) and str(a.type) == "Tensor" for x, a in pairs)


def _refuse_undense(tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise CaptureError(
            f"a tensor of layout {tensor.layout} ({calling_line()}) has no memory of its own that "
            "could be followed; plan the parts of the model around it"
        )
