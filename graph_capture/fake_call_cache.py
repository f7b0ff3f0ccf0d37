"""Run each kind of call on stand-ins once, and reuse the form of its result.

A step of twelve layers makes the same calls twelve times. To ask PyTorch what one
hands out takes some 200 us, mostly for finding out that it was asked before; here
the shapes of a call are compared with less care for what no capture has (symbolic
shapes, sparse, quantized and complex tensors). Only calls whose result follows
from their arguments' shapes are remembered: those that make dense tensors of
their own, or write into an argument and hand it back. Views, and whatever else is
unusual, go the long way each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .private_torch.dispatch import without_torch_dispatch
from .private_torch.fake_tensors import FakeTensor, FakeTensorMode
from .private_torch.operators import schema_of
from .private_torch.tensors import identity_of_storage
from .private_torch.trees import tree_iter

if TYPE_CHECKING:
    from .real_results import RealResults

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)
_Made = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class _Unusual(Exception):
    """An argument that keeps a call from being remembered."""


class FakeCallCache:
    """The results of calls on stand-ins of one mode.

    Parameters
    ----------
    fake_mode
        The mode that all stand-ins belong to; must be active where calls run.
    real
        Knows how results of real kernels lie; ``None`` leaves it to PyTorch.
    """

    def __init__(self, fake_mode: FakeTensorMode, real: RealResults | None = None) -> None:
        self._fake_mode = fake_mode
        self._real = real
        self._known: dict[Any, int | _Made | tuple[_Made, ...] | None] = {}

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Return ``func(*args, **kwargs)``, faster where it was called before."""
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
        """What PyTorch itself hands out, whatever it was asked before in this process.

        Its stand-ins have a memory of their own, which forgets that a tensor may be
        less than its block: a window of 16 made as 17 has another size the second time.
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
        """What the result of a call follows from; ``None`` if that is not known."""
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
        # Without tensors a call is one of few, and may look at more than its arguments.
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
        """How to make the like of ``out``; ``None`` where it must be asked for each time."""
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
        """A dense tensor that is all of its memory, else ``None``."""
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
    """Whether what is handed out has memory to speak of; sparse tensors have not."""
    return all(t.layout is torch.strided for t in tree_iter(out) if isinstance(t, torch.Tensor))


def _shares(args: tuple, out: Any) -> bool:
    """Whether a result looks at an argument's memory, as ``_unsafe_view``'s does unsaid."""
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
    """What is known of a tensor, told apart from other tuples."""

    __slots__ = ()


__all__ = ["FakeCallCache"]
