"""What people use today, beside a plan at the same peak, in one run.

Per-block checkpointing, by Transformers' own switch or by
``torch.utils.checkpoint`` around each block, and ``torch.compile`` with
``torch._functorch.config.activation_memory_budget``, a ratio of saved bytes.
A peer that fails leaves its error in its row.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from planner import InfeasibleBudgetError, measure
from planner.measuring.measure import measure_pair
from planner.training_step import train_step

from .bench import Bench, release
from .overhead import predicted_overhead

PEER_ERRORS = (
    RuntimeError,  # out of memory and Dynamo's own errors among them
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    LookupError,
    ImportError,
    OSError,
)
"""What a compiler or a model may raise while it is tried."""

_LOSS_TOLERANCE = {None: 1e-4, torch.bfloat16: 2e-2}
_TOLERANCE = {None: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to train with less memory.

    Parameters
    ----------
    model
        Name of the subject.
    method
        In words.
    error
        What it failed with; ``""`` if it did not.
    peak_bytes
        Measured, of the whole step, optimizer included.
    ratio
        Time of a step over eager's, without the optimizer: median of pairs.
    quartiles
        Of the same.
    loss_error
        Relative difference of the loss to eager's on the same seed.
    gradient_error
        Norm of the difference of all gradients to eager's, over their norm.
    gradients
        ``"equal"`` (in every value), ``"right"`` (to rounding), ``"WRONG"``, or
        ``"other draws"`` where the loss shows that dropout drew other numbers,
        so that there is nothing to compare.
    buffers
        The same of the model's buffers after that step, such as the running
        statistics of batch norm; ``""`` where it has none.
    predicted_bytes, predicted_ratio
        Of a plan.
    ratio_to_checkpointing
        Of a plan: its time over checkpointing's, measured in pairs of their own.
    """

    model: str
    method: str
    error: str = ""
    peak_bytes: int = 0
    ratio: float = math.nan
    quartiles: tuple[float, float] = (math.nan, math.nan)
    loss_error: float = math.nan
    gradient_error: float = math.nan
    gradients: str = ""
    buffers: str = ""
    predicted_bytes: int | None = None
    predicted_ratio: float | None = None
    ratio_to_checkpointing: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What one step of a new model leaves; tensors lie on the CPU."""

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def check_peers(
    bench: Bench, *, compile_budgets: tuple[float, ...] = (1.0, 0.5), num_pairs: int = 8
) -> list[Peer]:
    """Eager, checkpointing, our plan at the peak of checkpointing, compilation at each budget."""
    reference = _reference(bench, bench.make())
    rows = [_measured(bench, bench.make(), "eager", reference, 0)]
    rows += _checkpointing_and_plan(bench, reference, num_pairs)
    backend = compile_backend(bench.device)
    for budget in compile_budgets:
        rows.append(_compiled(bench, backend, budget, reference, num_pairs))
    return rows


def compile_backend(device: torch.device) -> str:
    """Inductor where it can generate kernels for the card, else AOTAutograd with eager's."""
    has_triton = importlib.util.find_spec("triton") is not None
    return "inductor" if device.type == "cuda" and has_triton else "aot_eager"


def enable_checkpointing(bench: Bench, model: nn.Module) -> str:
    """Turn on per-block checkpointing; returns how, in words."""
    if getattr(model, "supports_gradient_checkpointing", False):
        for prefix in ("activation", "gradient"):  # the second was the name until Transformers 5
            enable = getattr(model, f"{prefix}_checkpointing_enable", None)
            if enable is not None:
                enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
                return "per-block checkpointing, as Transformers has it"
    for block in bench.subject.blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return "per-block checkpointing, by torch.utils.checkpoint"


# -- rows --------------------------------------------------------------------


def _checkpointing_and_plan(bench: Bench, reference: Reference, num_pairs: int) -> list[Peer]:
    """Checkpointing, and a plan at its measured peak, timed against each other, too."""
    model = bench.make()
    try:
        method = enable_checkpointing(bench, model)
        with _peers_warnings():
            theirs = _measured(bench, model, method, reference, num_pairs)
    except PEER_ERRORS as error:
        return [_failed(bench, "per-block checkpointing", error)]
    try:
        return [theirs, _plan_at(bench, theirs.peak_bytes, model, reference, num_pairs)]
    finally:
        del model
        release(bench.device)


def _plan_at(
    bench: Bench, peak_bytes: int, checkpointed: nn.Module, reference: Reference, num_pairs: int
) -> Peer:
    """Our own row: a fault here is ours, so nothing but "no plan fits" is caught."""
    method = "plan at the peak of checkpointing"
    try:
        plan = bench.plan(peak_bytes)
    except InfeasibleBudgetError as error:
        return _failed(bench, method, error)
    model = plan.apply(bench.make())
    row = _measured(bench, model, method, reference, num_pairs)
    beside = _ratios(bench, checkpointed, model, num_pairs)
    return replace(
        row,
        predicted_bytes=plan.predicted_peak_bytes,
        predicted_ratio=1 + predicted_overhead(plan, bench.unplanned()),
        ratio_to_checkpointing=statistics.median(beside),
    )


def _compiled(
    bench: Bench, backend: str, budget: float, reference: Reference, num_pairs: int
) -> Peer:
    method = f"torch.compile ({backend}), activation_memory_budget {budget:g}"
    try:
        with _memory_budget(budget), _eager_draws(), _peers_warnings():
            torch._dynamo.reset()
            compiled = cast(nn.Module, torch.compile(bench.make(), backend=backend, dynamic=False))
            return _measured(bench, compiled, method, reference, num_pairs)
    except PEER_ERRORS as error:
        return _failed(bench, method, error)
    finally:
        torch._dynamo.reset()
        release(bench.device)


def _measured(
    bench: Bench, model: nn.Module, method: str, reference: Reference, num_pairs: int
) -> Peer:
    subject = bench.subject
    first = _against(bench, model, reference)
    model.zero_grad(set_to_none=True)
    release(bench.device)
    with bench.context():
        peak_bytes = measure(
            model, bench.sample(), optimizer=subject.optimizer, repeats=0, seed=bench.seed
        ).peak_bytes
    ratios = _ratios(bench, bench.model, model, num_pairs) if num_pairs else (1.0, 1.0)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Peer(
        model=subject.name,
        method=method,
        peak_bytes=peak_bytes,
        ratio=middle,
        quartiles=(low, high),
        **first,
    )


def _ratios(bench: Bench, first: nn.Module, second: nn.Module, num_pairs: int) -> tuple[float, ...]:
    """Time of the second model's step over the first's, pair by pair."""
    steps = (_step(bench, model) for model in (first, second))
    timing = measure_pair(*steps, repeats=num_pairs, device=bench.device)
    for model in (first, second):
        model.zero_grad(set_to_none=True)
    return timing.ratios


def _failed(bench: Bench, method: str, error: BaseException) -> Peer:
    first_line = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {first_line}"[:300]
    return Peer(model=bench.subject.name, method=method, error=text)


# -- gradients ---------------------------------------------------------------


def _reference(bench: Bench, model: nn.Module) -> Reference:
    _, loss = _step(bench, model)()
    if loss is None:
        raise ValueError(f"{bench.subject.label}: the model computes no loss to compare by")
    gradients = {_plain(name): p.grad for name, p in model.named_parameters()}
    copies = {name: grad.cpu().clone() for name, grad in gradients.items() if grad is not None}
    model.zero_grad(set_to_none=True)
    buffers = {_plain(name): b.cpu().clone() for name, b in model.named_buffers()}
    return Reference(loss=loss.item(), gradients=copies, buffers=buffers)


def _against(bench: Bench, model: nn.Module, reference: Reference) -> dict[str, Any]:
    """How a new model's first step differs from eager's, as fields of :class:`Peer`."""
    own = _reference(bench, model)
    loss_error = abs(own.loss - reference.loss) / max(abs(reference.loss), 1e-30)
    gradient_error = _distance(own.gradients, reference.gradients)
    buffer_error = _distance(own.buffers, reference.buffers)
    autocast = bench.subject.autocast
    return {
        "loss_error": loss_error,
        "gradient_error": gradient_error,
        "gradients": verdict(loss_error, gradient_error, autocast),
        "buffers": verdict(loss_error, buffer_error, autocast) if reference.buffers else "",
    }


def _distance(own: dict[str, Tensor], eager: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of eager's; infinite if some are missing."""
    if own.keys() != eager.keys():
        return math.inf
    differences = (own[name].double() - tensor.double() for name, tensor in eager.items())
    difference = sum(d.square().sum().item() for d in differences)
    size = sum(tensor.double().square().sum().item() for tensor in eager.values())
    return math.sqrt(difference / max(size, 1e-30))


def verdict(loss_error: float, error: float, autocast: torch.dtype | None) -> str:
    """What errors of a step mean, by the rounding of the dtype."""
    if loss_error == error == 0:
        return "equal"
    if not loss_error <= _LOSS_TOLERANCE[autocast]:
        return "other draws"
    return "right" if error <= _TOLERANCE[autocast] else "WRONG"


def _step(bench: Bench, model: nn.Module) -> Callable[[], tuple[object, Tensor | None]]:
    sample = bench.sample()

    def step() -> tuple[object, Tensor | None]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(bench.seed)
        with bench.context():
            return train_step(model, sample)

    return step


def _plain(name: str) -> str:
    return name.removeprefix("_orig_mod.")


# -- settings of the peers ---------------------------------------------------


@contextmanager
def _memory_budget(budget: float) -> Iterator[None]:
    import torch._functorch.config as config

    with config.patch(activation_memory_budget=budget):
        yield


@contextmanager
def _eager_draws() -> Iterator[None]:
    """Inductor draws as eager does, so that gradients can be compared under dropout."""
    import torch._inductor.config as config

    with config.patch(fallback_random=True):
        yield


@contextmanager
def _peers_warnings() -> Iterator[None]:
    """What compilers warn of is not of this check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
