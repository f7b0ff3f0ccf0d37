"""Measure a real training step's peak and time, as the device records them.

Everything that a budget counts is counted: what exists before the step (parameters,
buffers, optimizer state, inputs) and every byte that the step allocates through
PyTorch's allocator (gradients, activations, temporaries, kernel scratch, outputs that
the caller holds).

How the record is made
----------------------
peak = resident bytes + the highest sum of (allocated - freed) inside the step.

CPU
    The allocator reports every allocation and free to PyTorch's profiler. The
    recorder is the one behind ``torch.autograd.profiler_legacy``: it receives the same
    reports as ``torch.profiler``, in order, and does not write to stderr. Sizes are
    exact bytes, including oneDNN's reordered weights and scratch.
CUDA
    ``max_memory_allocated`` less what was allocated before. cuBLAS' workspace is freed
    first, so that the step makes its own and it counts. The caching allocator rounds
    blocks up to 512 bytes, and resident storages are rounded in the same way here.
    ``reserved_bytes`` is the most that the process held of the device, after the cache
    was emptied. It includes what fragmentation adds, and tensors that are not the
    step's.

Known imperfections
-------------------
- Memory that libraries allocate outside PyTorch's allocator (MKL's packing buffers,
  OpenMP stacks, the CUDA context) is not recorded, so it is in none of these figures.
- On CUDA, the allocator leaves a block of more than 1 MiB up to 1 MiB larger than
  requested if the rest is too small to be split off. Resident storages are counted
  without that.
- On CUDA, one step is recorded; over many steps, fragmentation may reserve more.
- On CPU, a block that existed before the step and is freed inside it counts as if it
  stayed: its free is not reported, or is reported with the size of an earlier block at
  the same address. Resident tensors are therefore kept until the record has ended.
- On CPU, allocations of threads other than the caller's are not reported, nor are frees:
  gloo's threads at times free a buffer of a collective, which then seems to stay.
- Tensors that only a Python closure nested in another object holds are not found as
  resident.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graph_capture.calls.spread_out import local_part
from graph_capture.costs.allocator import peak_extra_bytes as _record_cpu
from graph_capture.loop.data_parallel import DataParallel, bucket_bytes
from graph_capture.loop.fully_sharded import FullySharded
from graph_capture.loop.loop_holds import NOTHING_ELSE, Grads, LoopHolds, Outputs
from graph_capture.private_torch.devices import cublas_workspace_clearer
from graph_capture.private_torch.tensors import is_zero_tensor
from graph_capture.without_collector import without_collector

from ..base.data_parallel import Distributed, wrapped_by
from ..base.preserve_state import preserve_state
from ..base.resident import (
    gradients_of,
    resident_tensors,
    single_device,
    storage_bytes,
)
from ..base.training_step import (
    LossFn,
    Sample,
    build_optimizer,
    clear_gradients,
    make_step,
)
from ..running.attach import applied_plan

_STEPS_OF_WRAPPER = 3
"""A ``DistributedDataParallel`` makes its buckets anew in its second step, or third."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The measurements of a training step.

    Parameters
    ----------
    peak_bytes
        Most bytes alive at once during the step, resident ones included.
    resident_bytes
        Bytes alive before the step: parameters, buffers, optimizer state, inputs.
    reserved_bytes
        On CUDA, the most that the process's allocator held of the device during the
        recorded step, including other tensors of the process; ``None`` on the CPU,
        where the allocator holds nothing back.
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
    """Times of two callables that ran alternately.

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
        low, high = quartiles(self.ratios)
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
    outputs: Outputs | None = None,
    grads: Grads | None = None,
    resident_bytes: int | str | None = None,
    concurrent_calls: int | None = None,
    distributed: Distributed = None,
) -> Measurement:
    """Run training steps and measure their peak memory and time.

    Parameters, buffers, gradients, optimizer state, inputs and the random generators
    are restored afterwards. The first step is not measured: it builds what is built
    lazily, and the optimizer's state. The next one records the allocator, and then
    ``repeats`` steps are timed.

    Parameters
    ----------
    model
        Planned or not, on one device.
    sample_input
        A tensor, a tuple of positional arguments or a dict of keyword arguments.
    loss_fn
        Computes the scalar loss from the model's output; see
        :func:`planner.base.training_step.differentiate` for what happens without it.
    optimizer
        An instance, or a name such as ``"adamw"``: its state counts and its
        step runs. ``None`` counts none.
    repeats
        How many steps are timed; 0 gives a ``step_us`` of NaN.
    seed
        Given to ``torch.manual_seed`` before each step.
    outputs, grads, resident_bytes, concurrent_calls, distributed
        What the loop around the step holds, as for :func:`planner.optimize`. ``None`` for
        what the applied plan says; without one, outputs and nothing else. Nothing shows
        where the caller's other tensors lie: ``resident_bytes`` is added to what is
        measured, and so are buckets. Of a ``DistributedDataParallel``, and of a model that
        ``fully_shard`` has sharded, real steps of all processes are run, which have to call
        this together; the figures are this process's.

    Returns
    -------
    Measurement

    Raises
    ------
    ValueError
        When the model lies on several devices, or on one that cannot be measured.

    Notes
    -----
    Python's cyclic garbage collector runs before the recorded step and not during it,
    so that the figure is the same each time. An active autocast covers forward and
    loss of each step.

    Examples
    --------
    >>> layer = nn.Linear(4, 8, bias=False)
    >>> measured = measure(layer, torch.ones(2, 4), loss_fn=torch.sum, repeats=1)
    >>> measured.resident_bytes  # the weight and the input
    160
    """
    device = single_device(model, sample_input)
    run = model
    applied = applied_plan(model)
    plan = None if applied is None else applied.plan
    planned = NOTHING_ELSE if plan is None else plan.holds
    model, around = wrapped_by(run, planned.distributed if distributed is None else distributed)
    holds = LoopHolds.of(
        planned.outputs if outputs is None else outputs,
        planned.grads if grads is None else grads,
        planned.resident_bytes if resident_bytes is None else resident_bytes,
        planned.concurrent_calls if concurrent_calls is None else concurrent_calls,
        around,
    )
    if isinstance(around, FullySharded):
        raise ValueError(
            f"leave distributed={str(around)!r} out: a model that fully_shard has sharded is "
            "measured as it is, by all ranks together"
        )
    buckets = 0 if around is None else bucket_bytes(around, model.parameters(), device.type)
    with preserve_state(model, sample_input, loss_fn, optimizer):
        if isinstance(optimizer, str):
            optimizer = build_optimizer(optimizer, model.parameters())
        is_wrapped = DataParallel.found_on(run) is not None
        own = replace(holds, distributed=None) if is_wrapped else holds  # the wrapper does it
        step = make_step(
            run, sample_input, loss_fn=loss_fn, optimizer=optimizer, seed=seed, holds=own
        )
        for _ in range(_STEPS_OF_WRAPPER if is_wrapped else 1):
            step()
        clear_gradients(model, sample_input, loss_fn, set_to_none=not own.keeps_gradients)
        held = resident_tensors(model, sample_input, loss_fn=loss_fn, optimizer=optimizer)
        in_buckets = gradients_of(model) if holds.in_buckets else []
        held += [] if holds.in_buckets else gradients_of(model)
        there_bytes = storage_bytes(held, device) + holds.resident_bytes + buckets
        held += in_buckets
        extra_bytes, reserved_bytes = record_peak(step, device, held)
        step_us_all = tuple(timed_us(step, device) for _ in range(repeats))
    return Measurement(
        peak_bytes=there_bytes + extra_bytes,
        resident_bytes=there_bytes,
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
    """Time two callables alternately, for a ratio that a busy machine does not bias.

    Pairs run as A B B A, also in the warm-up, so that each of the two goes first
    equally often: the second of a pair finds caches as the first left them. The two of
    a pair run back to back, so a slow moment of the machine slows both, and the median
    over pairs ignores those that it hit unevenly.

    Parameters
    ----------
    first, second
        For instance two results of :func:`planner.base.training_step.make_step`.
    repeats
        Number of timed pairs; an odd number is rounded up to an even one.
    warmup
        Number of untimed pairs that run before.
    device
        The device, which is synchronized before each reading of the clock.
    """
    device = torch.device(device)
    for i in range(warmup):
        for call in (first, second) if i % 2 == 0 else (second, first):
            call()
    gc.collect()
    first_us: list[float] = []
    second_us: list[float] = []
    for i in range(repeats + repeats % 2):
        if i % 2 == 0:
            first_us.append(timed_us(first, device))
            second_us.append(timed_us(second, device))
        else:
            second_us.append(timed_us(second, device))
            first_us.append(timed_us(first, device))
    return PairedTiming(first_us=tuple(first_us), second_us=tuple(second_us))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile, interpolated between values; NaN if there are none.

    Examples
    --------
    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0]), quartiles([3.0])
    ((2.0, 4.0), (3.0, 3.0))
    """
    if len(values) < 2:
        return (values[0], values[0]) if values else (math.nan, math.nan)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def peak_extra_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the peak bytes of a call, beyond what was allocated before it.

    The call's results stay alive until the record has ended.
    """
    return record_peak(call, torch.device(device), [])[0]


def record_peak(
    call: Callable[[], Any], device: torch.device, resident: list[torch.Tensor]
) -> tuple[int, int | None]:
    """The most bytes that a call adds to those before it, and on CUDA the most reserved.

    Parameters
    ----------
    resident
        Tensors that exist before the call; the list is emptied. On the CPU their
        memory, but not the tensors, is held during the call, so that nothing is freed
        whose allocation was not recorded.
    """
    local = map(local_part, resident)
    dense = [t for t in local if t.layout == torch.strided and not is_zero_tensor(t)]
    kept = [t.untyped_storage() for t in dense] if device.type == "cpu" else []
    resident.clear()
    del dense
    gc.collect()
    try:
        with without_collector():
            if device.type == "cuda":
                return _record_cuda(call, device)
            return _record_cpu(call), None
    finally:
        kept.clear()


def _record_cuda(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    # cuBLAS workspaces outlive the step that made them; they count only if made again.
    clear_workspaces = cublas_workspace_clearer()
    if clear_workspaces is None:
        raise RuntimeError(
            f"torch {torch.__version__} cannot free cuBLAS' workspace, so a step's peak would "
            "miss it; measure with a version that this package supports"
        )
    clear_workspaces()
    # The cache that earlier steps left is not what this step needs.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    returned = call()
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    reserved_bytes = torch.cuda.max_memory_reserved(device)
    del returned
    return peak_bytes, reserved_bytes


def timed_us(call: Callable[[], Any], device: torch.device) -> float:
    """Return the microseconds of a call, including the work it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_ns = time.perf_counter_ns()
    returned = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed_us = (time.perf_counter_ns() - start_ns) / 1e3
    del returned
    return elapsed_us
