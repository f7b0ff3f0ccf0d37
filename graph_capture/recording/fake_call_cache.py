"""Run each kind of call on stand-ins once, and reuse the form of its result.

A step of twelve layers makes the same calls twelve times. Asking PyTorch for a
call's result takes some 200 us, mostly to find out that the call was made before.
The comparison here is simpler, because no capture has symbolic shapes or sparse,
quantized or complex tensors. Only calls whose result follows from their arguments'
shapes are cached: those that make dense tensors of their own, or write into an
argument and return it. Views, and everything else that is unusual, are not cached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..private_torch.dispatch import without_torch_dispatch
from ..private_torch.fake_tensors import FakeTensor, FakeTensorMode
from ..private_torch.operators import schema_of
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter

if TYPE_CHECKING:
    from .real_results import RealResults

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)
_Made = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class _Unusual(Exception):
    """An argument that keeps a call from being cached."""


class FakeCallCache:
    """The results of calls on stand-ins of one mode.

    Parameters
    ----------
    fake_mode
        The mode that all stand-ins belong to; must be active where calls run.
    real
        Knows the layout of real kernels' results; ``None`` leaves it to PyTorch.
    """

    def __init__(self, fake_mode: FakeTensorMode, real: RealResults | None = None) -> None:
        self._fake_mode = fake_mode
        self._real = real
        self._known: dict[Any, int | _Made | tuple[_Made, ...] | None] = {}

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Return ``func(*args, **kwargs)``, faster if it was called before."""
        key = self._key(func, args, kwargs)
        if key is None:
            return self._as_real(func, args, kwargs, self._asked(func, args, kwargs))
        known = self._known.get(key)
        if known is None:
            out = self._as_real(func, args, kwargs, func(*args, **kwargs))
            if key not in self._known:
                self._known[key] = self._noted(func, args, kwargs, out, key)
            return out
        if isinstance(known, int):
            return args[known]
        if isinstance(known[0], torch.Size):
            return self._make(known)
        return tuple(self._make(made) for made in known)

    def _asked(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """PyTorch's own result, independent of earlier calls in this process.

        PyTorch has its own cache of fake results. It forgets that a tensor may be smaller
        than its block: a window of 16 made as 17 has another size the second time.
        """
        before, self._fake_mode.cache_enabled = self._fake_mode.cache_enabled, False
        try:
            return func(*args, **kwargs)
        finally:
            self._fake_mode.cache_enabled = before

    def _as_real(self, func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
        return out if self._real is None else self._real.corrected(func, args, kwargs, out)

    def _make(self, made: _Made) -> FakeTensor:
        shape, stride, dtype, device = made
        with without_torch_dispatch():
            element = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(self._fake_mode, element, device)

    # -- which calls -------------------------------------------------------------

    def _key(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """All that determines the result of a call; ``None`` if that is not known."""
        if func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
            return None
        found: list[Any] = [
            func,
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ]
        before = len(found)
        try:
            for value in args:
                self._add(value, found)
            for name, value in kwargs.items():
                found.append(name)
                self._add(value, found)
        except _Unusual:
            return None
        # Calls without tensors are rare, and may depend on more than their arguments.
        return tuple(found) if any(type(x) is _Tensor for x in found[before:]) else None

    def _add(self, value: Any, found: list[Any]) -> None:
        if isinstance(value, torch.Tensor):
            found.append(self._tensor(value))
        elif isinstance(value, (list, tuple)):
            found.append((type(value), len(value)))
            for item in value:
                self._add(item, found)
        elif isinstance(value, _PLAIN) or type(value) is torch.memory_format:
            found.append((type(value), value))  # 1, 1.0 and True are equal
        else:
            raise _Unusual

    def _tensor(self, value: torch.Tensor) -> _Tensor:
        if (
            not isinstance(value, FakeTensor)
            or value.fake_mode is not self._fake_mode
            or value.layout is not torch.strided
            or value.dtype.is_complex
            or value.is_quantized
            or value.constant is not None
        ):
            raise _Unusual
        return _Tensor(
            (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        )

    def _noted(
        self, func: Any, args: tuple, kwargs: dict, out: Any, key: Any
    ) -> int | _Made | tuple[_Made, ...] | None:
        """How to make results like ``out``; ``None`` if PyTorch must be asked each time."""
        schema = schema_of(func)
        if schema.is_mutable:
            written = [
                i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write
            ]
            if len(written) != 1 or len(args) <= written[0] or out is not args[written[0]]:
                return None
            unchanged = self._key(func, args, kwargs) == key
            return written[0] if unchanged else None
        if any(r.alias_info is not None for r in schema.returns) or not _dense(out):
            return None
        if _shares((args, kwargs), out):
            return None
        if isinstance(out, torch.Tensor):
            return self._made(out)
        if not isinstance(out, tuple) or not out:
            return None
        made = tuple(self._made(o) for o in out)
        memory = {
            identity_of_storage(o.untyped_storage()) for o in out if isinstance(o, torch.Tensor)
        }
        if any(m is None for m in made) or len(memory) != len(out):
            return None
        return made  # type: ignore[return-value]

    def _made(self, out: Any) -> _Made | None:
        """How to make a dense tensor that fills its memory; ``None`` for any other result."""
        if not isinstance(out, FakeTensor) or out.storage_offset() or out.requires_grad:
            return None
        try:
            self._tensor(out)
        except _Unusual:
            return None
        made = (out.shape, out.stride(), out.dtype, out.fake_device)
        like = self._make(made)
        if like.untyped_storage().nbytes() != out.untyped_storage().nbytes():
            return None
        return made


def _dense(out: Any) -> bool:
    """Whether all tensors of a result are dense: sparse ones have no storage to look at."""
    return all(t.layout is torch.strided for t in tree_iter(out) if isinstance(t, torch.Tensor))


def _shares(args: tuple, out: Any) -> bool:
    """Whether a result shares an argument's memory; ``_unsafe_view`` does so undeclared."""
    given = {
        identity_of_storage(t.untyped_storage())
        for t in tree_iter(args)
        if isinstance(t, torch.Tensor)
    }
    made = {
        identity_of_storage(t.untyped_storage())
        for t in tree_iter(out)
        if isinstance(t, torch.Tensor)
    }
    return bool(given & made)


class _Tensor(tuple):
    """What is known of a tensor, as a type distinct from other tuples."""

    __slots__ = ()


__all__ = ["FakeCallCache"]
