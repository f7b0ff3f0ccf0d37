"""Track the allocations on fake tensors of code that stays eager."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..calls.storage_id import storage_id
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.fake_tensors import FakeTensor
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter, tree_map
from ..recording.real_results import RealResults
from ..values.loss_values import LossValues
from ..values.outcomes import ASKS, ReadsWhole


class Moment(NamedTuple):
    """The memory allocated once a call has its results, its grad mode, and what is gone by then.

    ``gone`` are the keys of memory that was lent (:meth:`MemoryMeter.lend`), which is
    counted elsewhere.
    """

    live_bytes: int
    grad_enabled: bool
    gone: frozenset[int] = frozenset()


class MemoryMeter(ReadsWhole):
    """Measures the peak of the memory that calls allocate while it is active, by real lifetimes.

    For code that stays eager (the user's loss, the optimizer). Storages are tracked
    by weak references, so Python locals and what autograd saves count for as long as
    they are really held.

    Parameters
    ----------
    known
        Whether a storage is counted elsewhere.
    twin
        Makes a stand-in for each real tensor that the code brings along.
    values
        Knows the values that the code asks for.
    real
        Knows the layout of real kernels' results; ``None`` leaves it to PyTorch.
    """

    def __init__(
        self,
        known: Callable[[int], bool] = lambda _sid: False,
        twin: Callable[[torch.Tensor], torch.Tensor] | None = None,
        values: LossValues | None = None,
        real: RealResults | None = None,
    ) -> None:
        super().__init__()
        self._values = values or LossValues()
        self._real = real
        self._twin = twin
        self.current_bytes = 0
        self.peak_bytes = 0
        self._known = known
        self._seen: set[int] = set()
        self._gone: frozenset[int] = frozenset()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.moments: list[Moment] = []  # one for each call
        self.constants: dict[int, int] = {}  # real tensors that the code brings along, in bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        own_args, own_kwargs = args, kwargs or {}
        args, kwargs = tree_map(self._lent, (own_args, own_kwargs))
        try:
            out = func(*args, **kwargs)
        except ASKS as error:
            out = self._values.answer(func, own_args, own_kwargs, error)
        else:
            if self._real is not None:
                out = self._real.corrected(func, args, kwargs, out)
        self._values.note(func, own_args, own_kwargs, out)
        if func.namespace != "prim":  # a fake tensor is asked for its device
            with disable_current_modes():  # a plain meta tensor is made at a tenth of the cost
                self.calls.append((func, shapes_of(args), shapes_of(kwargs), shapes_of(out)))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        if func.namespace != "prim":
            moment = Moment(self.current_bytes, torch.is_grad_enabled(), self._gone)
            self.moments.append(moment)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return out

    def read_whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """All values of a stand-in that the code reads outside of PyTorch."""
        return self._values.read(tensor)

    def _lent(self, value: Any) -> Any:
        """The value itself, or what stands in for a real tensor."""
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        self.constants[storage_id(value)] = value.untyped_storage().nbytes()
        return value if self._twin is None else self._twin(value)

    def lend(self, tensor: torch.Tensor, key: int) -> None:
        """Note when a memory that is counted elsewhere is freed."""
        storage = tensor.untyped_storage()
        self._seen.add(identity_of_storage(storage))
        weakref.finalize(
            storage, _returned, weakref.ref(self), identity_of_storage(storage), key
        ).atexit = False

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        sid = identity_of_storage(storage)
        if sid in self._seen or self._known(sid):
            return
        num_bytes = storage.nbytes()
        self._seen.add(sid)
        self.current_bytes += num_bytes

        # The interpreter holds finalizers. One that held the meter would keep everything that the
        # meter references, up to the model, alive for as long as a storage that the meter tracks.
        weakref.finalize(storage, _freed, weakref.ref(self), sid, num_bytes).atexit = False

    def _forget(self, sid: int, num_bytes: int) -> None:
        self.current_bytes -= num_bytes
        self._seen.discard(sid)


def _returned(meter: weakref.ref[MemoryMeter], sid: int, key: int) -> None:
    listening = meter()
    if listening is not None:
        listening._forget(sid, 0)
        listening._gone |= {key}


def _freed(meter: weakref.ref[MemoryMeter], sid: int, num_bytes: int) -> None:
    listening = meter()
    if listening is not None:
        listening._forget(sid, num_bytes)


def shapes_of(tree: Any) -> Any:
    """Replace tensors by meta tensors of the same memory size, so that no storage is held."""
    return tree_map(lambda x: _shape(x) if isinstance(x, torch.Tensor) else x, tree)


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if tensor.layout is torch.strided:
        num_bytes = tensor.untyped_storage().nbytes()
        if num_bytes > made.untyped_storage().nbytes():
            made.untyped_storage().resize_(num_bytes)
    return made
