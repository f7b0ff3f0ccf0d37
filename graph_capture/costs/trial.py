"""Run one call of a step alone, on synthetic arguments that resemble the step's own.

A call is identified by its operator, the shapes, strides and dtypes of its tensors, its
other arguments and the grad mode. Its values are made up so that it runs as it does in
the step: normal numbers for activations and gradients, and indices within range, spread
over all of it. Calls that are not safe on made-up values are not run at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..calls.writes import written_arguments
from ..private_torch.dispatch import below_autograd, without_autocast
from ..private_torch.operators import schema_of
from ..private_torch.tensors import negated_view
from ..private_torch.trees import tree_flatten, tree_iter, tree_map
from .blank_values import ONE_ZERO, fills_of
from .cost_model import Call

aten = torch.ops.aten

# Kernels that must not run on made-up values: they read memory at addresses that their arguments
# name, or another library's packed state, or assert that values are probabilities or fitting
# counts. On CUDA a failed assertion ends the process's use of the card.
_UNSAFE = re.compile(
    r"aten::(.*(ctc|quantize|fbgemm|sparse|packed|cudnn|miopen|_rnn|_lstm|_gru|lstm_|gru_).*"
    r"|max_unpool.*|.*gather_.*|segment_.*|binary_cross_entropy(_backward)?|multinomial|poisson"
    r"|binomial|masked_scatter.*)"
)
_SAFE_ALL_THE_SAME = {
    "aten::mkldnn_rnn_layer",
    "aten::mkldnn_rnn_layer_backward",
    "aten::cudnn_batch_norm",
}

# Kernels that fail on a matrix of zeros or of noise, or whose scratch grows with the norm.
_WANTS_REGULAR = re.compile(r"aten::_?(linalg|cholesky|lu_|inverse|triangular|ormqr|logdet|det).*")

# What a call raises if it refuses its arguments, errors of CUDA and of allocators included:
# PyTorch's are RuntimeErrors, NumPy's is a MemoryError.
REFUSALS = (
    RuntimeError,
    IndexError,
    ValueError,
    TypeError,
    NotImplementedError,
    MemoryError,
)

_ALIGNMENT_BYTES = 64  # of PyTorch's own CPU allocator (c10/core/alignment.h, gAlignment)
_POOL_LENGTH = 1 << 20
_STEP = 2654435761  # Knuth's multiplicative hash: indices visit their range in no order
_RUN_LENGTH = 64  # of equal values in a mask, as in padding and causal masks


def is_safe(func: Any) -> bool:
    """Whether a call may run on synthetic values, including normal random numbers."""
    if schema_of(func).name in _SAFE_ALL_THE_SAME:
        return True
    if func in (aten.bernoulli.default, aten.bernoulli_.Tensor, aten.bernoulli.out):
        return False  # its argument holds probabilities
    return func.namespace == "aten" and _UNSAFE.fullmatch(schema_of(func).name) is None


def call_key(call: Call, torch_type: str) -> str:
    """Return the key that tells a call from others with possibly different time or scratch.

    The key is text, the same in every process. It includes which tensors are passed
    twice, and which lie on the CPU beside a device of another type, ``torch_type``.
    """
    leaves, spec = tree_flatten((call.args, call.kwargs))
    first: dict[int, int] = {}
    parts = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            same = first.setdefault(id(leaf), i)
            shape, strides = list(leaf.shape), list(leaf.stride())
            place = "@cpu" if leaf.device.type == "cpu" != torch_type else ""
            bits = ("conj" if leaf.is_conj() else "") + ("neg" if leaf.is_neg() else "")
            said = f"{leaf.dtype}{shape}{strides}{bits}{place}"
            parts.append(f"={same}" if same != i else said)
        else:
            parts.append(repr(leaf))
    grad = "grad" if call.grad_enabled else "no_grad"
    if torch.Tag.dynamic_output_shape in call.func.tags and _is(call.out):
        parts.append(f"picks {list(call.out.shape)}")
    return f"{call.func} {grad} ({', '.join(parts)}) {spec}"


def argument_bytes(call: Call) -> int:
    """Bytes of the arguments made for a call, and of a copy of those that it writes to."""
    tensors = {id(t): t for t in tree_iter((call.args, call.kwargs)) if _is(t)}
    written = {id(t): t for t in written_arguments(call.func, call.args, call.kwargs)}
    return sum(_extent(t) * t.element_size() for t in (*tensors.values(), *written.values()))


def output_bytes(call: Call) -> int:
    """Return the bytes of a call's results."""
    return sum(_extent(t) * t.element_size() for t in tree_iter(call.out) if _is(t))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A call with its own arguments, ready to run again and again.

    Parameters
    ----------
    func, args, kwargs
        The call.
    grad_enabled
        The grad mode that it runs in.
    fresh
        Each tensor that the call writes to, with its initial values.
    """

    func: Any
    args: tuple
    kwargs: dict
    grad_enabled: bool
    fresh: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __call__(self) -> Any:
        """Run once, as a planned graph does; see :func:`as_in_a_step`."""
        return self.func(*self.args, **self.kwargs)

    def refresh(self) -> None:
        """Undo what runs have written, so that values neither grow nor vanish over runs."""
        for tensor, values in self.fresh:
            tensor.copy_(values)


@contextmanager
def as_in_a_step(device: torch.device) -> Iterator[None]:
    """Run below autograd and autocast, as a step's kernels do; generators are restored."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        below_autograd(),
        without_autocast(),
        torch.no_grad(),
    ):
        yield


def blank_arguments(
    func: Any, args: tuple, kwargs: dict, device: torch.device
) -> tuple[tuple, dict]:
    """Arguments to measure scratch with: zeros, or what the operator needs instead."""
    regular = _WANTS_REGULAR.fullmatch(schema_of(func).name) is not None
    written = {id(t) for t in written_arguments(func, args, kwargs)}  # these may be resized
    fills = fills_of(func, args, kwargs)

    def make(x: Any) -> Any:
        if isinstance(x, torch.Generator):
            return x.clone_state()  # the loop's own, whose numbers the loss will draw
        if not _is(x):
            return x
        if id(x) in fills:
            flat, real = _memory(x, device)
            fill = fills[id(x)]
            if isinstance(fill, tuple):
                real.copy_(torch.tensor(fill))
            elif isinstance(fill, str):
                assert fill == ONE_ZERO
                flat.fill_(1)[:1] = 0
            elif isinstance(fill, Fraction):
                flat.fill_(0)[: int(fill * flat.numel())] = 1
            else:
                flat.fill_(fill)
            return real
        if not regular and device.type == "cpu" and id(x) not in written:
            return _zeros_on_cpu(x)
        flat, real = _memory(x, device)
        if regular:
            _fill_regular(flat, real)
        else:
            flat.fill_(0)
        return real

    def with_bits(x: Any) -> Any:
        """Keep lazy conjugation and negation: a kernel that does not know them copies first."""
        made = make(x)
        if _is(x) and x.is_conj():
            made = made.conj()
        return negated_view(made) if _is(x) and x.is_neg() else made

    return tree_map(with_bits, args), tree_map(with_bits, kwargs)


def fill_mask(call: Call, args: tuple) -> None:
    """Let the one mask among made-up arguments pick as many elements as the call's own mask.

    The kernel lists them in scratch memory, 8 bytes for each element and dimension.
    """
    name = schema_of(call.func).name.split("::")[1].strip("_").removesuffix("_impl")
    if name not in ("index", "index_put", "unsafe_index", "masked_select", "nonzero"):
        return
    position = 0 if name == "nonzero" else 1
    masks = [t for t in tree_iter(args[position]) if _is(t) and t.dtype == torch.bool]
    picked = args[2] if name == "index_put" else call.out
    if len(masks) != 1 or not _is(picked) or picked.dim() == 0:
        return
    (mask,) = masks
    before = 0 if name in ("masked_select", "nonzero") else _place_of_mask(args[1])
    repeated = [d for d in range(mask.dim()) if mask.stride(d) == 0 and mask.shape[d] > 1]
    own = mask
    for d in repeated:  # each element of an expanded mask picks several times
        own = own.narrow(d, 0, 1)
    if picked.dim() > before and own.is_contiguous() and own.numel():
        own.view(-1)[: picked.shape[before] * own.numel() // mask.numel()] = True


def _place_of_mask(indices: Any) -> int:
    return next(i for i, index in enumerate(indices) if index is not None)


def _zeros_on_cpu(like: torch.Tensor) -> torch.Tensor:
    """Zeros in memory that the operating system returns zeroed.

    Filling a step's largest tensors takes longer than running the call. Pages that are
    only read stay shared and are never filled (``calloc``, which PyTorch's own
    allocator does not use). Such a tensor cannot be resized.
    """
    num_bytes = _extent(like) * like.element_size()
    memory = np.zeros(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    flat = torch.from_numpy(memory[start : start + num_bytes]).view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


class Maker:
    """Makes arguments on one device.

    Parameters
    ----------
    device
        Where the tensors of the step lie; those that the step keeps on the CPU
        beside a card stay there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.empty(_POOL_LENGTH).normal_(generator=generator).to(device)

    def trial(self, call: Call) -> Trial:
        """A call with its own arguments.

        Raises
        ------
        RuntimeError
            When there is not enough memory.
        """
        kinds = _Kinds.of(call)
        made: dict[int, torch.Tensor] = {}

        def make(x: Any) -> Any:
            if not _is(x):
                return x
            if id(x) not in made:
                made[id(x)] = self._tensor(x, kinds)
            return made[id(x)]

        args, kwargs = tree_map(make, call.args), tree_map(make, call.kwargs)
        written = {id(t): t for t in written_arguments(call.func, args, kwargs)}
        return Trial(
            func=call.func,
            args=args,
            kwargs=kwargs,
            grad_enabled=call.grad_enabled,
            fresh=tuple((t, t.clone()) for t in written.values()),
        )

    def _tensor(self, like: torch.Tensor, kinds: _Kinds) -> torch.Tensor:
        flat, real = _memory(like, self._device)
        if kinds.regular:
            _fill_regular(flat, real)
        elif like.dtype == torch.bool:
            _fill_mask(flat)
        elif like.is_floating_point() or like.is_complex():
            self._fill_normal(flat, id(like) in kinds.positive)
        elif id(like) in kinds.ranges:
            _fill_indices(flat, *kinds.ranges[id(like)])
        else:
            flat.fill_(1 if kinds.pointwise else 0)  # no division by zero, no place out of range
        return real

    def _fill_normal(self, flat: torch.Tensor, positive: bool) -> None:
        pool = self._normal[: flat.numel()].to(flat.device)
        pool = (pool.abs() + 0.1 if positive else pool).to(flat.dtype)
        for start in range(0, flat.numel(), _POOL_LENGTH):
            part = flat[start : start + _POOL_LENGTH]
            part.copy_(pool[: part.numel()])


def _memory(like: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized memory, and a tensor in it with the shape and strides of another."""
    where = like.device if like.device.type == "cpu" else device
    flat = torch.empty(_extent(like), dtype=like.dtype, device=where)
    return flat, flat.as_strided(like.shape, like.stride())


def _fill_mask(flat: torch.Tensor) -> None:
    places = torch.arange(flat.numel(), device=flat.device)
    flat.copy_(places.div_(_RUN_LENGTH, rounding_mode="floor").remainder_(2).eq_(0))


def _fill_indices(flat: torch.Tensor, end: int, in_order: bool) -> None:
    places = torch.arange(flat.numel(), device=flat.device)
    if in_order:
        places = places.mul_(end).div_(max(1, flat.numel()), rounding_mode="floor")
    else:
        places = places.mul_(_STEP).remainder_(max(1, end))
    flat.copy_(places)


def _fill_regular(flat: torch.Tensor, real: torch.Tensor) -> None:
    """Invertible matrices, with a norm at which iterations do not stop early."""
    flat.fill_(0)
    if real.dim() >= 2 and (real.is_floating_point() or real.is_complex()):
        real.diagonal(dim1=-2, dim2=-1).fill_(64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kinds:
    """Which values the tensors of a call need; tensors by ``id``.

    Parameters
    ----------
    ranges
        For tensors of indices: the end of their range, and whether they come in order.
    positive
        Tensors that stand for variances, or whose root or logarithm is taken.
    pointwise
        Whether integers are numbers, not places.
    regular
        Whether matrices must be regular.
    """

    ranges: dict[int, tuple[int, bool]]
    positive: set[int]
    pointwise: bool
    regular: bool

    @classmethod
    def of(cls, call: Call) -> _Kinds:
        return cls(
            ranges=_index_ranges(call),
            positive=_positive(call),
            pointwise=torch.Tag.pointwise in call.func.tags,
            regular=_WANTS_REGULAR.fullmatch(schema_of(call.func).name) is not None,
        )


def _positive(call: Call) -> set[int]:
    by_name = _by_name(call)
    found = {id(by_name[n]) for n in _POSITIVE_ARGUMENTS if n in by_name}
    if schema_of(call.func).name.split("::")[1].rstrip("_") in _OF_POSITIVE:
        found.update(id(t) for t in tree_iter(call.args) if _is(t))
    return found


_POSITIVE_ARGUMENTS = ("running_var", "save_invstd", "save_var", "rstd", "invstd")
_OF_POSITIVE = {"sqrt", "rsqrt", "log", "log2", "log10", "addcdiv", "_foreach_sqrt"}


def _by_name(call: Call) -> dict[str, Any]:
    names = [a.name for a in schema_of(call.func).arguments]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def _index_ranges(call: Call) -> dict[int, tuple[int, bool]]:
    given = _by_name(call)
    name = schema_of(call.func).name.split("::")[1].rstrip("_").removeprefix("_unsafe_")
    ends: list[tuple[Any, int]] = []
    in_order = False
    if name == "embedding":
        ends = [(given["indices"], given["weight"].shape[0])]
    elif name == "embedding_dense_backward":
        ends = [(given["indices"], given["num_weights"])]
    elif name.startswith("nll_loss"):
        logits = given["self"]
        ends = [(given["target"], logits.shape[1 if logits.dim() > 1 else 0])]
    elif name in _ALONG_A_DIMENSION:
        source = given["self"]
        ends = [(given["index"], source.shape[given["dim"]] if source.dim() else 1)]
    elif name in ("index", "index_put", "_index_put_impl"):
        places = zip(given["indices"], given["self"].shape, strict=False)
        ends = [(index, size) for index, size in places if index is not None]
    elif "max_pool" in name and "indices" in given:
        num_dims = 3 if "3d" in name else 2
        ends = [(given["indices"], math.prod(given["self"].shape[-num_dims:]))]
        in_order = True
    return {id(t): (end, in_order) for t, end in ends if _is(t) and t.dtype != torch.bool}


_ALONG_A_DIMENSION = {
    "gather",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_select",
    "index_add",
    "index_copy",
    "index_fill",
}


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last that a tensor covers."""
    if tensor.numel() == 0:
        return 0
    places = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in places)


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
