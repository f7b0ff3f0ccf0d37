"""From a model and a budget to a plan. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.errors import CaptureError
from graph_capture.loop.loop_holds import Grads, LoopHolds, Outputs

from .base.budget import read_budget
from .base.data_parallel import Distributed, wrapped_by
from .base.progress import ShowProgress
from .base.request import Request
from .base.shape_range import Shapes
from .base.solve_options import SolveOptions
from .base.step_spec import StepSpec
from .block_plan import BlockPlan
from .blocks.find import has_blocks
from .blocks.make_blocks import make_block_plan
from .plan import Plan
from .planning.captured_call import captured_call
from .planning.make_plan import make_plan

Granularity = Literal["step", "blocks"]

IN_BLOCKS = (
    "Where only a part of the step cannot be captured, plan inside the model's blocks, and leave "
    "that part as it is: optimize(…, granularity='blocks')"
)


def optimize(
    model: nn.Module,
    sample_input: Any,
    *,
    budget: str | None = None,
    budget_gb: float | str | None = None,
    budget_bytes: int | None = None,
    shapes: Shapes = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    gap: float = 0.001,
    seed: int = 0,
    never_recompute: Sequence[str] = (),
    always_recompute: Sequence[str] = (),
    reorder: bool = False,
    device: str | Device | None = None,
    autocast: torch.dtype | None = None,
    cost_model: CostModelChoice = "roofline",
    headroom: float | str | None = None,
    outputs: Outputs = "held",
    grads: Grads = "none",
    resident_bytes: int | str = 0,
    concurrent_calls: int = 1,
    granularity: Granularity = "step",
    blocks: str | Sequence[str] = "auto",
    distributed: Distributed = None,
    progress: ShowProgress = None,
) -> Plan:
    """Plan a training step of ``model`` whose peak memory stays within a budget.

    The budget is the device's peak during a whole step: parameters, buffers,
    gradients, optimizer state, inputs, outputs, activations, temporaries and
    scratch. The model is not changed; :meth:`Plan.apply` makes it train by the plan.

    Parameters
    ----------
    model
        In training mode, on the device where it will train. Of a
        ``DistributedDataParallel`` the module inside is planned.
    sample_input
        A tensor, a tuple of positional arguments or a dict of keyword
        arguments. Shapes, dtypes and devices matter; values where forward asks
        for them (``mask.all()``, ``.item()``, ``x[mask]``): each step is checked
        for the sample's answers. Under autocast, call this under the same autocast.
    budget, budget_gb, budget_bytes
        One of them. ``budget`` is a share of the predicted peak of this step without a
        plan, such as ``"60%"``, or an amount such as ``"40GB"``. 1 GB = 10^9 bytes;
        ``budget_gb`` also takes ``"40GiB"``.
    shapes
        Which dimensions of the sample's tensors vary in the loop, and the largest size of
        each: ``{"input_ids": {0: 16, 1: 512}}`` (``torch.export.Dim`` has a ``max``, too), or
        ``"sample"`` for every dimension up to the sample's own size. The plan is made for
        the largest; a call within this range takes its schedule over, whatever
        ``on_shape_change`` says of others, and never exceeds the budget. It is about
        shapes alone: a call whose values lead another way through the model is another.
    loss_fn
        What the training loop computes from the output: a scalar. It stays in
        the loop; its memory and time are counted. Without it the scalar output
        or ``output.loss`` is differentiated, else every output that requires
        grad.
    optimizer
        An instance or a name such as ``"adamw"``; ``None`` counts none.
    solver
        A name of ``solvers.solve``.
    time_limit_s
        For solving.
    gap
        Solving stops when the plan is proven to be this near to the least possible
        step time, as a fraction of it; the least is 0.0001, which counts as optimal.
    seed
        The same inputs and seed give the same plan, unless the time limit cuts
        the solve.
    never_recompute, always_recompute
        Patterns that name operators, see ``graph_capture.policies``.
    reorder
        Whether operators may first run in an order other than eager's, in the same time
        and with the same bits. The search for orders shares the time limit; convnets
        gain a little, transformers next to nothing (``docs/design.md``).
    device
        Where the step will run: ``"h100"`` or another name of
        ``graph_capture.costs.devices``, which need not be present. ``None`` means the
        model's device; a model on ``meta`` is planned for the CPU.
    autocast
        The dtype of the autocast to plan under, for a device that is not present;
        ``None`` for the active autocast.
    cost_model
        ``"roofline"`` (data sheets), ``"profile"`` (each distinct call is timed
        on the device and remembered on disk; ``graph_capture.costs.profile.Profile``
        names another directory for that than the user's cache), or a function of a
        ``graph_capture.costs.cost_model.Call`` that returns microseconds, or
        ``None`` to leave a call to the roofline.
    headroom
        Part of the budget that the plan leaves free: a fraction of it (``0.05``,
        ``"5%"``), or bytes such as ``"2GB"``. ``None`` for the device's default:
        none on CPU, 3 % on CUDA for fragmentation and the prediction's error
        (``planner.base.budget.DEFAULT_HEADROOM``).
    outputs
        What the loop does with the model's outputs: ``"held"`` to the end of the step, or
        ``"released"`` once it has the loss, as Transformers' Trainer does. Logits that are
        only an input of the loss are then gone before the backward pass.
    grads
        Whether gradients are in memory when the step begins: ``"none"``, or
        ``"accumulated"`` from earlier micro-batches (with ``zero_grad(set_to_none=False)``,
        too). Their sum stays; new gradients are handed on in groups of up to 25 MiB, and the
        budget has room for the set and one group. ``"consumed"``: hooks
        (``register_post_accumulate_grad_hook``) step the optimizer for each parameter as its
        gradient arrives and free it; the budget has room for one group, and for what the
        optimizer takes for one parameter.
    resident_bytes
        What else of the caller's is on the device all the while (an averaged copy of the
        weights, a reference model): bytes, or such as ``"2GB"``.
    concurrent_calls
        How many calls of the model the loop makes before it differentiates the first: 2 for
        a siamese or contrastive loss; with ``grads="accumulated"`` a pipeline's micro-batches
        in flight, which are differentiated one by one. All run by the plan, and all of them
        together stay within the budget.
    granularity
        ``"step"`` plans the whole step as one. ``"blocks"`` plans inside the model's own
        blocks, so that hooks on blocks, ``fully_shard`` and pipeline stages stay as they
        are, and returns a :class:`planner.BlockPlan`; what lies between the blocks runs
        as it is (``docs/blocks.md``).
    blocks
        Which modules these are: a pattern of module paths such as ``"model.layers.*"``,
        several, or ``"auto"`` for the model's lists of layers.
    distributed
        ``"ddp"`` where the model trains inside a ``DistributedDataParallel``, whose buckets
        are counted; its options that change memory follow with commas between them:
        ``"ddp:gradient_as_bucket_view,static_graph"``, ``"ddp:find_unused_parameters"``. Of
        a model that is wrapped already they are found. With ``granularity="blocks"``
        ``"fsdp2:ranks=8"`` makes the budget that of one rank where ``fully_shard`` shards each
        block and the model; options are in ``docs/distributed.md``.
    progress
        ``True`` shows a progress bar, while calls are timed and while the solver
        runs; a function receives :class:`solvers.progress.ProgressEvent`.

    Raises
    ------
    InfeasibleBudgetError
        When nothing fits; the message says the least budget that would, and what
        determines it.
    CaptureError
        When the step cannot be captured; the message names the line responsible.
    TypeError
        When ``model`` is not a module, or the sample does not fit its signature.
    ValueError
        When an argument is invalid.
    """
    model, around = wrapped_by(model, distributed)
    spec = StepSpec(
        model=model,
        sample_input=sample_input,
        shapes=shapes,
        loss_fn=loss_fn,
        optimizer=optimizer,
        device=device,
        autocast=autocast,
        cost_model=cost_model,
        holds=LoopHolds.of(outputs, grads, resident_bytes, concurrent_calls, around),
    )
    request = Request.of(
        spec,
        SolveOptions(solver=solver, time_limit_s=time_limit_s, gap=gap, seed=seed, reorder=reorder),
        budget=read_budget(budget, budget_gb, budget_bytes),
        headroom=headroom,
        never_recompute=never_recompute,
        always_recompute=always_recompute,
        progress=progress,
    )
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity is one of {get_args(Granularity)}, got {granularity!r}")
    if granularity != "blocks" and blocks != "auto":
        raise ValueError(
            f"blocks={blocks!r:.100} is for plans in blocks: add granularity='blocks', or leave it "
            "out"
        )
    if granularity == "blocks":
        return BlockPlan.of_blocks(*make_block_plan(spec, request, blocks), spec.loss_fn)
    try:
        with captured_call(spec, progress) as call:
            return Plan.of(*make_plan(call, request.settled(call.unplanned_peak_bytes)))
    except CaptureError as error:
        if has_blocks(model):
            error.add_note(IN_BLOCKS)
        raise
