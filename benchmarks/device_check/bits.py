"""Check whether a planned step computes eager's bits, if eager repeats its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graph_capture.units import format_bytes
from planner import Plan, optimize
from planner.base.training_step import train_step

from ..testing.bitwise import assert_same_tensors
from .bench import Bench, Where, without_plan

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_LEARNING_RATE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Bits:
    """A comparison of bits over several steps.

    Parameters
    ----------
    model
        Name of the subject.
    where
        The plan's budget, as requested.
    budget_bytes
        The same in bytes.
    num_steps
        Number of compared steps, each with its own input and seed.
    algorithms
        ``"as they are"``, or ``"deterministic"`` if PyTorch was set so.
    eager_differs
        How eager differs from itself under these algorithms; ``""`` if it does not.
    planned_differs
        How the planned step differs from eager; ``""`` if it does not. ``None`` if there
        was nothing to compare with, because eager differs from itself.
    """

    model: str
    where: Where
    budget_bytes: int
    num_steps: int
    algorithms: str
    eager_differs: str
    planned_differs: str | None

    @property
    def equal(self) -> bool:
        """Whether all bits were compared and were equal."""
        return self.planned_differs == ""


def check_bits(
    bench: Bench, where: Where, *, num_steps: int = 3, deterministic: bool = False
) -> list[Bits]:
    """Compare losses, outputs, gradients, buffers and generators of eager and planned steps.

    Eager is compared with itself first. If it differs (some CUDA kernels add with
    atomics, in any order), the comparison is made again under deterministic algorithms,
    with a plan made under them.

    Parameters
    ----------
    where
        See :meth:`Bench.budget_bytes`.
    deterministic
        Whether to begin with deterministic algorithms.

    Returns
    -------
    list
        One entry for each set of algorithms tried.
    """
    budget_bytes = bench.budget_bytes(where)
    tried: list[Bits] = []
    for algorithms in ("deterministic",) if deterministic else ("as they are", "deterministic"):
        if tried and not tried[-1].eager_differs:
            break
        with _deterministic() if algorithms == "deterministic" else nullcontext():
            eager_differs = _eager_differs(bench, num_steps)
            planned_differs = None
            if not eager_differs:
                planned_differs = _differs(bench, _plan(bench, budget_bytes), num_steps)
        tried.append(
            Bits(
                model=bench.subject.name,
                where=where,
                budget_bytes=budget_bytes,
                num_steps=num_steps,
                algorithms=algorithms,
                eager_differs=eager_differs,
                planned_differs=planned_differs,
            )
        )
    return tried


def _plan(bench: Bench, budget_bytes: int) -> Plan:
    if not torch.are_deterministic_algorithms_enabled():
        return bench.plan(budget_bytes)
    with bench.context():  # other kernels may be dispatched, so make another plan
        return optimize(
            bench.model,
            bench.sample(),
            budget_bytes=budget_bytes,
            optimizer=bench.subject.optimizer,
            time_limit_s=bench.time_limit_s,
            seed=bench.seed,
            headroom=0,
        )


def _eager_differs(bench: Bench, num_steps: int) -> str:
    """How eager differs from itself, or that it has no deterministic algorithm."""
    try:
        return _differs(bench, None, num_steps)
    except RuntimeError as error:
        if torch.are_deterministic_algorithms_enabled() and "determinis" in str(error):
            return f"it has no deterministic algorithm: {error}"
        raise


def _differs(bench: Bench, plan: Plan | None, num_steps: int) -> str:
    """How the second of two equal steps differs from the first; ``""`` if it does not.

    Both run on one set of weights, with buffers restored in between, so that large
    models need no second copy. The weights are then updated.

    Parameters
    ----------
    plan
        The plan of the second step; ``None`` to compare eager with itself.
    """
    model = bench.model
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    before = _buffers(model)
    try:
        with bench.applied(plan) if plan is not None else nullcontext():
            for i in range(num_steps):
                seed = bench.seed + 1 + i
                sample = bench.sample(seed)
                buffers = _buffers(model)
                expected = _step(bench, without_plan(model), sample, seed)
                _put_back(model, buffers)
                actual = _step(bench, model, sample, seed)
                try:
                    assert_same_tensors(expected, actual, f"in step {i + 1} of {num_steps}")
                except AssertionError as error:
                    return str(error).strip()
                del expected, actual
                with torch.no_grad():
                    for p in model.parameters():
                        if p.grad is not None:
                            p.add_(p.grad, alpha=-_LEARNING_RATE)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        _put_back(model, before)
    return ""


def _step(
    bench: Bench, run: Callable[..., Any], sample: dict[str, Tensor], seed: int
) -> dict[str, Any]:
    """A step's results by name; gradients are the tensors themselves, buffers are copies."""
    model = bench.model
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with bench.context():
        output, loss = train_step(run, sample)
    seen: dict[str, Any] = {"loss": loss}
    for i, leaf in enumerate(tree_leaves(output)):
        if isinstance(leaf, Tensor):
            seen[f"output {i}"] = leaf.detach()
    for name, p in model.named_parameters():
        seen[f"gradient of {name}"] = p.grad
    seen |= {f"buffer {name}": b for name, b in _buffers(model).items()}
    seen["state of the CPU generator"] = torch.get_rng_state()
    if bench.device.type == "cuda":
        seen["state of the CUDA generator"] = torch.cuda.get_rng_state(bench.device)
    return seen


def _buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def _put_back(model: torch.nn.Module, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, with the setting that cuBLAS needs for them."""
    was = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    setting = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")  # read at each product
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned_only)
        if setting is None:
            del os.environ[_CUBLAS]


def words(bits: Bits) -> str:
    """The outcome in a few words."""
    at = f"{bits.num_steps} steps at {format_bytes(bits.budget_bytes)}"
    if bits.eager_differs:
        return f"{at}: eager differs from itself ({bits.eager_differs})"
    return f"{at}: equal" if bits.equal else f"{at}: DIFFERENT: {bits.planned_differs}"
