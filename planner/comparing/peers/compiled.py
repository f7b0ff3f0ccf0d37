"""The peer ``torch.compile`` with an activation memory budget.

The budget is a ratio of saved bytes: 1 is what the partitioner saves to minimize run
time, 0 is what a checkpoint around the whole model would save. It is not a peak, and
bytes are refused.

Each such peer calls ``torch._dynamo.reset()`` before and after it runs, so that no code
compiled at another budget is used. This drops everything that ``torch.compile`` has
compiled in the process; it is compiled again on its next call.

Known to be wrong (PyTorch 2.13, seen on the CPU)
-------------------------------------------------
Below a budget of 1, the result of a random call may not be saved, and the backward graph
then draws again from the generator's state at that time. So dropout's backward pass has
another mask than its forward pass, and the generator ends in another state. Random calls
get their state back only if a user's checkpoint has marked them as recomputed
(``functionalize_rng_ops`` in ``torch/_functorch/partitioners.py``); calls that the
budget's solver leaves out have no such mark. Inductor with its own random numbers (the
default) saves the seeds and is right for budgets between 0 and 1, but wrong at 0, where
only the graph's inputs are saved. With ``fallback_random`` it is as wrong as the others.
:mod:`planner.comparing.execution.step_verdict` detects this.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn

from graph_capture.private_torch.compiler import (
    forget_compiled_code,
    functorch_config,
    inductor_config,
)

from .peer import (
    Peer,
    Ready,
    Situation,
)


def compile_peer(budget: float, backend: str | None = None, *, eager_draws: bool = False) -> Peer:
    """``torch.compile`` at one activation memory budget.

    Parameters
    ----------
    budget
        From 0 to 1, a ratio of saved bytes.
    backend
        Backend of ``torch.compile``; ``None`` for Inductor if it can generate kernels
        for the card, else AOTAutograd with eager's kernels.
    eager_draws
        Whether Inductor draws as eager does (``fallback_random``), so that gradients
        can be compared under dropout. This is not what users run, and its gradients may
        be wrong where Inductor's own draws are right.

    Raises
    ------
    ValueError
        When the budget is not from 0 to 1.

    Notes
    -----
    Running it drops all compiled code of the process (``torch._dynamo.reset()``).
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"an activation memory budget is a ratio from 0 to 1, not {budget!r}")
    prepare = functools.partial(
        _compiled, budget=float(budget), backend=backend, eager_draws=eager_draws
    )
    return Peer(
        name=f"compile_budget_{float(budget)}" + f"_{backend}" * bool(backend),
        summary=f"torch.compile, activation_memory_budget {budget:g}",
        source="torch._functorch.config.activation_memory_budget",
        prepare=prepare,
    )


def compile_backend(device: torch.device) -> str:
    """Return Inductor if it can generate kernels for the GPU, else AOTAutograd with eager's."""
    has_triton = importlib.util.find_spec("triton") is not None
    return "inductor" if device.type == "cuda" and has_triton else "aot_eager"


@contextmanager
def _compiled(
    model: nn.Module,
    situation: Situation,
    *,
    budget: float,
    backend: str | None,
    eager_draws: bool,
) -> Iterator[Ready]:
    config = functorch_config()
    backend = backend or compile_backend(situation.device)
    with ExitStack() as settings:
        settings.enter_context(config.patch(activation_memory_budget=budget))
        if hasattr(config, "enable_autograd_cache"):
            # Do not reuse a partition of an earlier run with another budget.
            settings.enter_context(config.patch(enable_autograd_cache=False))
        if eager_draws:
            settings.enter_context(inductor_config().patch(fallback_random=True))
        forget_compiled_code()
        settings.callback(forget_compiled_code)
        compiled = torch.compile(model, backend=backend, dynamic=False)
        setting = f"budget={budget:g}, {backend}" + ", fallback_random" * eager_draws
        yield Ready(model=cast(nn.Module, compiled), setting=setting)
