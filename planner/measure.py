"""A real training step's peak and time, as the device itself records them.

Everything that a budget counts is counted: what is there before the step
(parameters, buffers, optimizer state, inputs) and every byte that the step
allocates through PyTorch's allocator (gradients, activations, temporaries,
kernel scratch, outputs in the caller's hands).

How the record is made
----------------------
peak = resident bytes + the highest sum of (allocated - freed) inside the step.

CPU
    The allocator reports every allocation and free to PyTorch's profiler. The
    recorder is the one behind ``torch.autograd.profiler_legacy``: it hears the
    same reports as ``torch.profiler``, in order, and does not write to stderr.
    Sizes are exact bytes, oneDNN's reordered weights and scratch included.
CUDA
    ``max_memory_allocated``. The caching allocator rounds blocks up to 512
    bytes, and so are resident storages here. ``reserved_bytes`` is the most
    that the process held of the device: what fragmentation adds shows there.

Known imperfections
-------------------
- Memory that libraries take behind the allocator's back (MKL's packing buffers,
  OpenMP stacks, the CUDA context) is in no allocator's record, hence in none
  of these figures.
- On CPU, a block that was there before the step and is freed inside it counts
  as if it stayed: its free is not reported.
- On CPU, allocations made by other threads than the caller's are not reported.
- Tensors that only a Python closure nested in another object holds are not
  found as resident.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graph_capture.costs.allocator import peak_extra_bytes as _record_cpu

from .application import applied_plan
from .training_step import (
    LossFn,
    Sample,
    build_optimizer,
    clear_gradients,
    make_step,
    output_tensors,
)

_CUDA_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a training step took.

    Parameters
    ----------
    peak_bytes
        Most bytes alive at once during the step, resident ones included.
    resident_bytes
        Bytes alive before the step: parameters, buffers, optimizer state, inputs.
    reserved_bytes
        On CUDA the most that the process' allocator held of the device;
        ``None`` on CPU, where nothing is held back.
    step_us
        Median time of a step, in microseconds.
    step_us_all
        Time of each repeat, in the order in which they ran.
    device, torch_version, num_threads, seed
        Where and how it was measured.
    budget_bytes, predicted_peak_bytes
        Of the plan that is applied to the model; ``None`` without one.
    """

    peak_bytes: int
    resident_bytes: int
    reserved_bytes: int | None
    step_us: float
    step_us_all: tuple[float, ...]
    device: str
    torch_version: str
    num_threads: int
    seed: int
    budget_bytes: int | None = None
    predicted_peak_bytes: int | None = None

    def __str__(self) -> str:
        text = (
            f"peak {self.peak_bytes / 1e9:.3f} GB ({self.resident_bytes / 1e9:.3f} resident), "
            f"step {self.step_us / 1e3:.2f} ms (median of {len(self.step_us_all)}), "
            f"{self.device}, torch {self.torch_version}, {self.num_threads} threads"
        )
        if self.reserved_bytes is not None:
            text += f", reserved {self.reserved_bytes / 1e9:.3f} GB"
        if self.predicted_peak_bytes is not None and self.budget_bytes is not None:
            text += (
                f"; predicted {self.predicted_peak_bytes / 1e9:.3f} GB, "
                f"budget {self.budget_bytes / 1e9:.3f} GB"
            )
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTiming:
    """Times of two callables that ran in turn.

    Parameters
    ----------
    first_us, second_us
        Time of each run, in microseconds; entry ``i`` of both ran back to back.
    """

    first_us: tuple[float, ...]
    second_us: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Second over first, pair by pair."""
        return tuple(b / a for a, b in zip(self.first_us, self.second_us, strict=True))

    @property
    def ratio(self) -> float:
        """Median of :attr:`ratios`."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        low, *_, high = statistics.quantiles(self.ratios, n=4)
        return (
            f"ratio {self.ratio:.3f} (quartiles {low:.3f} to {high:.3f}, {len(self.ratios)} pairs)"
        )


def measure(
    model: nn.Module,
    sample_input: Sample,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> Measurement:
    """Run training steps and report their peak memory and their time.

    Parameters, buffers, gradients, optimizer state, inputs and the random
    generators are afterwards what they were before. One step runs first that is
    not measured (lazily built things, the optimizer's state), one under the
    allocator's record, then ``repeats`` with a clock.

    Parameters
    ----------
    model
        Planned or not, on one device.
    sample_input
        A tensor, a tuple of positional arguments or a dict of keyword arguments.
    loss_fn
        Computes the scalar loss from the model's output; see
        :func:`planner.training_step.differentiate` for what happens without.
    optimizer
        An instance, or a name such as ``"adamw"``: its state counts and its
        step runs. ``None`` counts none.
    repeats
        How many steps are timed; none gives a ``step_us`` of NaN.
    seed
        Given to ``torch.manual_seed`` before each step.

    Returns
    -------
    Measurement

    Raises
    ------
    ValueError
        When the model lies on several devices, or on one that cannot be measured.

    Notes
    -----
    Python's cyclic garbage collector runs before the recorded step and not
    during it, so that the figure is the same each time. An autocast that is on
    covers forward and loss of each step.

    Examples
    --------
    >>> layer = nn.Linear(4, 8, bias=False)
    >>> measured = measure(layer, torch.ones(2, 4), loss_fn=torch.sum, repeats=1)
    >>> measured.resident_bytes  # the weight and the input
    160
    """
    device = single_device(model, sample_input)
    plan = applied_plan(model)
    with _restored(model, sample_input, loss_fn, optimizer):
        if isinstance(optimizer, str):
            optimizer = build_optimizer(optimizer, model.parameters())
        step = make_step(model, sample_input, loss_fn=loss_fn, optimizer=optimizer, seed=seed)
        step()
        clear_gradients(model, sample_input, loss_fn)
        held = resident_tensors(model, sample_input, loss_fn=loss_fn, optimizer=optimizer)
        resident_bytes = storage_bytes(held, device)
        del held
        extra_bytes, reserved_bytes = _record_peak(step, device)
        step_us_all = tuple(_timed_us(step, device) for _ in range(repeats))
    return Measurement(
        peak_bytes=resident_bytes + extra_bytes,
        resident_bytes=resident_bytes,
        reserved_bytes=reserved_bytes,
        step_us=statistics.median(step_us_all) if step_us_all else float("nan"),
        step_us_all=step_us_all,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch_version=torch.__version__,
        num_threads=torch.get_num_threads(),
        seed=seed,
        budget_bytes=None if plan is None else plan.budget_bytes,
        predicted_peak_bytes=None if plan is None else plan.predicted_peak_bytes,
    )


def measure_pair(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    repeats: int = 20,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> PairedTiming:
    """Time two callables in turn, for a ratio that a busy machine cannot tilt.

    Which of the two goes first changes from pair to pair. Each pair runs back to
    back, so a slow moment of the machine slows both; the median over pairs
    forgets those that it hit unevenly.

    Parameters
    ----------
    first, second
        For instance two results of :func:`planner.training_step.make_step`.
    repeats
        Number of timed pairs.
    warmup
        Number of pairs that run before, untimed.
    device
        Is synchronized before each reading of the clock.
    """
    device = torch.device(device)
    for _ in range(warmup):
        first()
        second()
    gc.collect()
    first_us: list[float] = []
    second_us: list[float] = []
    for i in range(repeats):
        if i % 2 == 0:
            first_us.append(_timed_us(first, device))
            second_us.append(_timed_us(second, device))
        else:
            second_us.append(_timed_us(second, device))
            first_us.append(_timed_us(first, device))
    return PairedTiming(first_us=tuple(first_us), second_us=tuple(second_us))


def peak_extra_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes that a call holds at once beyond what was there before it.

    What the call returns stays alive until the record has ended.
    """
    return _record_peak(call, torch.device(device))[0]


def resident_tensors(
    model: nn.Module,
    sample_input: Sample,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Tensor]:
    """Every tensor that is there before a step begins, aliases included.

    Parameters, buffers, other tensors that are attributes of a module, the
    inputs, the optimizer's state, and what ``loss_fn`` carries with it (a
    module's own tensors, a closure's or a partial's). Gradients are not: a step
    begins with none.
    """
    tensors = [*_module_tensors(model), *output_tensors(sample_input)]
    if loss_fn is not None:
        tensors += _carried_tensors(loss_fn)
    if optimizer is not None:
        tensors += [t for state in optimizer.state.values() for t in output_tensors(state)]
    return tensors


def storage_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the distinct storages of the tensors that lie on the device."""
    sizes: dict[int, int] = {}
    for t in tensors:
        if t.device == device and t.layout == torch.strided:
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
    if device.type == "cuda":
        return sum(-(-size // _CUDA_BLOCK_BYTES) * _CUDA_BLOCK_BYTES for size in sizes.values())
    return sum(sizes.values())


def single_device(model: nn.Module, sample_input: Sample) -> torch.device:
    """The one device on which a model's parameters lie, or its inputs if it has none.

    Raises
    ------
    ValueError
        When there is not exactly one, or it is neither a CPU nor a CUDA device.
    """
    tensors: list[Tensor] = [*model.parameters()] or [*output_tensors(sample_input)]
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"a step is measured on one device; the model lies on: {names}")
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"a real step cannot be measured on device {str(device)!r}")
    return device


def _record_peak(call: Callable[[], Any], device: torch.device) -> tuple[int, int | None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            return _record_cuda(call, device)
        return _record_cpu(call), None
    finally:
        if was_enabled:
            gc.enable()


def _record_cuda(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    # cuBLAS workspaces outlive the step that made them; made anew they are counted.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    returned = call()
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    del returned
    return peak_bytes, torch.cuda.max_memory_reserved(device)


def _timed_us(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_ns = time.perf_counter_ns()
    returned = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed_us = (time.perf_counter_ns() - start_ns) / 1e3
    del returned
    return elapsed_us


def _module_tensors(module: nn.Module) -> list[Tensor]:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        tensors += [value for value in vars(part).values() if isinstance(value, Tensor)]
    return tensors


def _carried_tensors(function: Callable[..., Any]) -> list[Tensor]:
    if isinstance(function, nn.Module):
        return _module_tensors(function)
    if isinstance(function, functools.partial):
        return [
            *output_tensors((function.args, function.keywords)),
            *_carried_tensors(function.func),
        ]
    cells = getattr(function, "__closure__", None) or ()
    return [t for cell in cells for t in output_tensors(cell.cell_contents)]


@contextmanager
def _restored(
    model: nn.Module,
    sample_input: Sample,
    loss_fn: LossFn | None,
    optimizer: torch.optim.Optimizer | str | None,
) -> Iterator[None]:
    """Give back, at the end, every value that a step changes; copies lie on the CPU."""
    parts = [part for part in (model, loss_fn) if isinstance(part, nn.Module)]
    registered = [(m._buffers, dict(m._buffers)) for part in parts for m in part.modules()]
    inputs = output_tensors(sample_input)
    tensors = [*inputs, *(b for part in parts for b in part.buffers())]
    leaves = [t for t in inputs if t.requires_grad and t.is_leaf]
    leaves += [p for part in parts for p in part.parameters()]
    if optimizer is not None:
        tensors += model.parameters()
    if isinstance(optimizer, torch.optim.Optimizer):
        tensors += [t for state in optimizer.state.values() for t in output_tensors(state)]
        leaves += [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [p for group in optimizer.param_groups for p in group["params"]]
        states = {p: dict(state) for p, state in optimizer.state.items()}
        groups = [dict(group) for group in optimizer.param_groups]
    unique = {id(t): t for t in tensors}.values()
    copies = [(t, t.detach().to("cpu", copy=True)) for t in unique]
    grads = [(leaf, leaf.grad) for leaf in {id(t): t for t in leaves}.values()]
    # torch.manual_seed seeds every CUDA device as well, if CUDA is in use.
    cuda_devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=cuda_devices):
        try:
            for leaf, _ in grads:
                leaf.grad = None
            yield
        finally:
            with torch.no_grad():
                for t, copy in copies:
                    t.copy_(copy)
            for leaf, grad in grads:
                leaf.grad = grad
            for buffers, saved in registered:
                buffers.update(saved)
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.state.clear()
                optimizer.state.update(states)
                for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
                    group.update(saved_group)
