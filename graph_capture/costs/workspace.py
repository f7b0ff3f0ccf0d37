"""Scratch memory that kernels allocate while they run.

How much a kernel takes depends on the library behind it: oneDNN reorders weights into
blocks that suit the processor, attention keeps tiles for each thread. So it is
measured. Each distinct call runs once, alone, while the allocator's reports are
recorded. It runs on zeros, or on multiples of the identity if zeros make no sense. On a
card it runs once before, because what cuBLAS and cuDNN keep from then on is not this
call's scratch. Not run are calls that are known to take none, calls that are not safe on
made-up values, and any call if no real device is at hand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..calls.collectives import is_collective
from ..private_torch.operators import has_kernel, overload_name_of, schema_of
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter, tree_map
from .allocator import CUDA_BLOCK_BYTES, peak_extra_bytes, peak_extra_bytes_on_card
from .blank_values import runs_on_blanks
from .cost_model import Call
from .free_memory import free_bytes
from .profile_cache import ProfileCache
from .trial import (
    REFUSALS,
    argument_bytes,
    as_in_a_step,
    blank_arguments,
    call_key,
    fill_mask,
    output_bytes,
)

logger = logging.getLogger(__name__)
aten = torch.ops.aten

# A number in place of a tensor becomes a tensor, of int64 or double; where the others have
# another dtype, it is cast to theirs.
_SCALAR_BYTES = 8
_COMPLEX_DOUBLE_BYTES = 16

_LEAST_BY_BLOCKS = 60 * 60  # elements

# The largest calls of a language model. If nothing must be copied first, their CPU kernels keep
# what they need on the stack (aten/src/ATen/native/SoftMax.cpp, LossNLL.cpp).
_BY_ROWS = {
    "aten::_softmax",
    "aten::_log_softmax",
    "aten::_softmax_backward_data",
    "aten::_log_softmax_backward_data",
    "aten::nll_loss_forward",
    "aten::nll_loss_backward",
}

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}

# Kernels that only allocate or move memory: all that they take, they return.
_TAKES_NONE = re.compile(
    r"aten::(empty.*|new_.*|.*_like|zeros|ones|full|arange|clone|copy_|_to_copy|cat|stack|fill_"
    r"|zero_|bernoulli_|lift_fresh)"
)

# Calls whose fake outputs do not tell their real size: they must run once.
_OPAQUE_OUTPUTS = {"aten::mkldnn_rnn_layer", "aten::_embedding_bag"}

# Calls that copy all of the memory that their first argument looks at (``clone_preserve_strides``,
# aten/src/ATen/native/TensorConversions.cpp), of which their fake outputs may show a part.
_COPY_ALL_MEMORY = {
    "aten::copy",
    "aten::slice_scatter",
    "aten::select_scatter",
    "aten::diagonal_scatter",
    "aten::as_strided_scatter",
}


_WITHOUT_A_WORD = {
    *("aten", "prim", "prims", "rngprims", "profiler", "higher_order", "quantized"),
    *("mkl", "mkldnn", "onednn", "c10d", "_c10d_functional", "symm_mem", "fsdp"),
}

SCRATCH_NOT_COUNTED = "scratch of kernels not counted: the device is not at hand"


class WorkspaceProbe:
    """Measures the scratch memory of calls, each distinct one once.

    Parameters
    ----------
    device
        Where the calls run.
    at_hand
        Whether the model lies on a real device. If not, nothing is run and
        scratch counts as zero.
    scratch
        Whether scratch is wanted at all.
    cache
        Stores measurements for other processes; ``None`` measures again each time.
    too_long
        Whether a call would take too long to run for this. Its scratch then counts
        as zero, and :attr:`notes` says so.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        at_hand: bool,
        scratch: bool = True,
        cache: ProfileCache | None = None,
        too_long: Callable[[Call], bool] = lambda _call: False,
    ) -> None:
        self._too_long = too_long
        self._unknown: set[str] = set()
        self._foreign: set[str] = set()
        self._device = torch.device(device)
        there = self._device.type == "cpu" or torch.cuda.is_available()
        self._measures = at_hand and there
        self._scratch = scratch
        self._cache = cache
        self._known: dict[str, int] = {}

    def bytes_of(self, call: Call) -> int:
        """Return the bytes that the call allocates and frees, in addition to its outputs."""
        func, args, kwargs, out = call.func, call.args, call.kwargs, call.out
        if self._scratch and is_collective(func):  # which cannot run alone
            return _of_collective(call) if self._on_cpu else 0
        if not self._measures or not self._scratch:
            return 0
        name = schema_of(func).name
        given = [t for t in tree_iter((args, kwargs)) if _is(t)]
        lazy = any(t.is_conj() or t.is_neg() for t in given)  # a kernel may copy it first
        pointwise = torch.Tag.pointwise in func.tags and not lazy
        if pointwise and _is_one_loop(func) and not _reduced(call):
            # TensorIterator copies what it must cast first (aten/src/ATen/TensorIterator.cpp).
            if len({t.dtype for t in (*given, *filter(_is, tree_iter(out)))}) <= 1:
                return _number_bytes(args, given) if self._on_cpu else 0
        elif _only_moves(name, given):
            return 0
        elif not runs_on_blanks(func):
            if not _is_ours_or_pytorchs(func):
                self._foreign.add(name)
            return 0
        if self._on_cpu and name in _PRODUCTS and _plain_product(call):
            return sum(_bytes(t) for t in args if isinstance(t, torch.Tensor) and _must_copy(t))
        if self._on_cpu and name in _BY_ROWS and _plain_rows(call):
            return 0
        return self._remembered(call)

    def _remembered(self, call: Call) -> int:
        key = call_key(call, self._device.type)
        if key not in self._known:
            known = None if self._cache is None else self._cache.get("scratch_bytes", key)
            if known is None:
                known = None if self._too_long(call) else _measure(call, self._device)
                if known is None:
                    self._unknown.add(key)
                if self._cache is not None and known is not None:
                    self._cache.put("scratch_bytes", key, known)
            self._known[key] = known or 0
        return self._known[key]

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what readers of the memory figures must know."""
        if self._scratch and not self._measures:
            return (SCRATCH_NOT_COUNTED,)
        notes = []
        if self._foreign:
            notes.append(
                f"scratch of {', '.join(sorted(self._foreign))} not measured, counted as zero: "
                "kernels of other libraries do not run on made-up arguments; plan.validate() "
                "measures a real step, and headroom= leaves room"
            )
        if self._unknown:
            notes.append(
                f"scratch of {len(self._unknown)} distinct calls not measured, counted as zero: "
                "they are too large, take too long, or refuse made-up arguments"
            )
        return tuple(notes)

    @property
    def _on_cpu(self) -> bool:
        return self._device.type == "cpu"

    def output_bytes(self, func: Any, args: tuple, kwargs: dict) -> tuple[int, ...] | None:
        """Return the real bytes of each output, for calls whose fake outputs do not tell them."""
        if not (self._measures and self._on_cpu):
            return None
        name = schema_of(func).name
        if name in _COPY_ALL_MEMORY and _looks_at_a_part(args[0]):
            args, kwargs = tree_map(_in_its_memory, (args, kwargs))
        elif name in _OPAQUE_OUTPUTS:
            args, kwargs = blank_arguments(func, args, kwargs, self._device)
        else:
            return None
        with as_in_a_step(self._device), torch.enable_grad():
            results = func(*args, **kwargs)
        return tuple(t.untyped_storage().nbytes() for t in tree_iter(results))


def _is_ours_or_pytorchs(func: Any) -> bool:
    """Whether a call is one of a capture's own, which take no scratch, or of ATen's."""
    return func.namespace in _WITHOUT_A_WORD or func.namespace.startswith("remat")


def _looks_at_a_part(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > _bytes(tensor)


def _in_its_memory(value: Any) -> Any:
    """Blank values at the same place in as much memory."""
    if not _is(value):
        return value
    memory = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8)
    flat = memory[: memory.numel() // value.element_size() * value.element_size()]
    places = (value.shape, value.stride(), value.storage_offset())
    return flat.view(value.dtype).as_strided(*places)


def _of_collective(call: Call) -> int:
    """Bytes of gloo's copies of the larger of two buffers.

    Source: ``torch/csrc/distributed/c10d/ProcessGroupGloo.cpp``. What libraries take on other
    devices is their own and not known here.
    """
    tensors = {True: call.args, False: call.out}
    larger = {"all_gather_into_tensor": False, "reduce_scatter_tensor": True}
    reads = larger.get(schema_of(call.func).name.partition("::")[2].removesuffix("_coalesced"))
    if reads is None:
        return 0
    return sum(_bytes(t) for t in tree_iter(tensors[reads]) if _is(t))


@cache
def _is_one_loop(func: Any) -> bool:
    """Whether an elementwise call is one kernel, not made of other calls.

    A number in place of a tensor does not change that: it becomes a tensor first.
    """
    if overload_name_of(func).startswith("Scalar"):
        return True
    name = schema_of(func).name + (
        f".{overload_name_of(func)}" if overload_name_of(func) != "default" else ""
    )
    return not has_kernel(name, "CompositeExplicitAutograd")


def _only_moves(name: str, given: list[torch.Tensor]) -> bool:
    return bool(_TAKES_NONE.fullmatch(name)) and not any(map(_is_copied_by_blocks, given))


def _is_copied_by_blocks(t: torch.Tensor) -> bool:
    """Whether a copy goes through blocks, as for larger columns (aten/src/ATen/native/Copy.cpp)."""
    by_columns = t.dim() == 2 and t.stride() == (1, t.shape[0])
    return by_columns and t.numel() >= _LEAST_BY_BLOCKS and not t.is_contiguous()


def _number_bytes(args: tuple, given: list[torch.Tensor]) -> int:
    if any(isinstance(x, complex) for x in args):
        return _COMPLEX_DOUBLE_BYTES + max((t.element_size() for t in given), default=0)
    number = next((x for x in args if isinstance(x, (int, float))), None)
    if number is None:
        return 0
    own = torch.float64 if isinstance(number, float) else torch.int64
    cast = [t.element_size() for t in given if t.dtype != own]
    return _SCALAR_BYTES + max(cast, default=0)


def _plain_product(call: Call) -> bool:
    tensors = [t for t in call.args if _is(t)]
    return tensors[0].dtype in (torch.float32, torch.float64) and all(t.numel() for t in tensors)


def _reduced(call: Call) -> bool:
    """Whether a call returns less than it reads, like a loss that takes the mean."""
    given = [t.numel() for t in tree_iter((call.args, call.kwargs)) if _is(t)]
    made = [t.numel() for t in tree_iter(call.out) if _is(t)]
    return bool(given) and bool(made) and max(made) < max(given)


def _plain_rows(call: Call) -> bool:
    """Whether a call of ``_BY_ROWS`` works on dense rows of one floating type, along them."""
    tensors = [t for t in tree_iter((call.args, call.kwargs, call.out)) if _is(t)]
    floats = {t.dtype for t in tensors if t.is_floating_point()}
    if floats not in ({torch.float32}, {torch.float64}):
        return False
    if not all(t.is_contiguous() for t in tensors):
        return False
    if schema_of(call.func).name.startswith("aten::nll_loss"):
        return True
    position = 2 if "backward" in schema_of(call.func).name else 1
    return call.args[position] in (-1, tensors[0].dim() - 1)


def _must_copy(matrix: torch.Tensor) -> bool:
    """Whether a product first copies this operand, because neither rows nor columns are dense."""
    if matrix.dim() < 2 or matrix.numel() == 0:
        return False
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    by_rows = column_stride == 1 and row_stride >= max(1, columns)
    by_columns = row_stride == 1 and column_stride >= max(1, rows)
    return not (by_rows or by_columns)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _measure(call: Call, device: torch.device) -> int | None:
    """Peak of one run, less what it returns.

    ``None`` for a call that refuses its arguments or does not fit into free memory;
    neither is stored on disk.
    """
    free = free_bytes(device)
    if free is not None and argument_bytes(call) + 2 * output_bytes(call) > free:
        logger.debug("%s does not fit into %d free bytes: no scratch known", call.func, free)
        return None
    measure = _peak_on_card if device.type == "cuda" else _peak_on_cpu
    results: list[Any] = []
    try:
        with as_in_a_step(device), torch.set_grad_enabled(call.grad_enabled):
            args, kwargs = blank_arguments(call.func, call.args, call.kwargs, device)
            fill_mask(call, args)
            peak = measure(lambda: call.func(*args, **kwargs), results, device)
    except (torch.OutOfMemoryError, MemoryError):
        logger.debug("%s runs out of memory: no scratch known", call.func)
        return None
    except REFUSALS as error:
        logger.debug("%s does not run on zeros, no scratch known: %s", call.func, error)
        return None
    given = {identity_of_storage(t.untyped_storage()) for t in tree_iter((args, kwargs)) if _is(t)}
    block = CUDA_BLOCK_BYTES if device.type == "cuda" else 1
    produced = {
        identity_of_storage(t.untyped_storage()): -(-t.untyped_storage().nbytes() // block) * block
        for t in tree_iter(results)
        if _is(t) and t.device.type == device.type
    }
    handed_out = sum(size for sid, size in produced.items() if sid not in given)
    if schema_of(call.func).name not in _OPAQUE_OUTPUTS and any(
        _is(t) for t in tree_iter(call.out)
    ):
        handed_out = min(handed_out, _said_bytes(call, block))
    return max(0, peak - handed_out)


def _said_bytes(call: Call, block: int) -> int:
    """Bytes of the stand-ins of a call's results; the real results may hold more."""
    given = {
        identity_of_storage(t.untyped_storage())
        for t in tree_iter((call.args, call.kwargs))
        if _is(t)
    }
    said = {
        identity_of_storage(t.untyped_storage()): -(-t.untyped_storage().nbytes() // block) * block
        for t in tree_iter(call.out)
        if _is(t)
    }
    return sum(size for sid, size in said.items() if sid not in given)


def _peak_on_cpu(run: Callable[[], Any], results: list[Any], _device: torch.device) -> int:
    return peak_extra_bytes(lambda: results.append(run()))


def _peak_on_card(run: Callable[[], Any], results: list[Any], device: torch.device) -> int:
    with torch.cuda.device(device):
        run()  # libraries allocate here what they keep: workspaces of cuBLAS, plans of cuDNN
        return peak_extra_bytes_on_card(lambda: results.append(run()), device)


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
