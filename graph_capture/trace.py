"""Trace a training step, forward, loss and backward, into one torch.fx graph.

The model runs once on fake tensors under :class:`~graph_capture.recorder.Recorder`,
autograd included, so the graph holds the very calls that eager dispatches.
Nothing is allocated, and the model is left as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import Graph, Node

from .call_spec import TensorSpec, call_forward, objects_of, tensors_of
from .checkpointing import checkpoints_inlined
from .errors import CaptureError, NotFittingError
from .isolation import swap_tensors, undisturbed
from .loss import LossFn, LossRegion, LossSpec, differentiate, without_autocast
from .outputs import OutputTemplate, take_apart, tensors_within
from .recorder import Recorder, storage_id
from .stand_ins import StandIns
from .target import Target, target_of

logger = logging.getLogger(__name__)

_DECIDED_BY_VALUE = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, kw_only=True)
class Reassigned:
    """A buffer that forward replaces by another tensor, ``self.mean = 0.9 * self.mean + …``.

    Parameters
    ----------
    target
        Its name in the model.
    output
        Index into ``TracedStep.outputs`` of the new value.
    keeps_object
        Whether the tensor object stays and only its memory is exchanged
        (``self.mean.data = …``).
    """

    target: str
    output: int
    keeps_object: bool


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """One training step as a torch.fx graph.

    Parameters
    ----------
    graph
        Placeholders carry ``meta["role"]`` (parameter, buffer, input, constant,
        tangent) and ``meta["target"]``; calls carry ``val``, ``phase``,
        ``writes``, ``module_path`` and ``source``. The output is
        ``(outputs, gradients)``.
    outputs
        Nodes of the tensors that forward returns, then of ``reassigned``.
    template
        Rebuilds the model's own output structure from them.
    differentiated
        Indices into ``outputs`` whose gradient the backward expects.
    tangents
        Placeholders of those gradients, in the same order.
    gradients
        ``(placeholder, gradient node)`` of every leaf that receives one.
    constants
        Tensors that forward uses beside parameters, buffers and inputs.
    reassigned
        Buffers that forward replaces.
    """

    graph: Graph
    outputs: tuple[Node, ...]
    template: OutputTemplate
    differentiated: tuple[int, ...]
    tangents: tuple[Node, ...]
    gradients: tuple[tuple[Node, Node], ...]
    constants: Mapping[str, torch.Tensor]
    loss: LossRegion
    detached: tuple[int, ...]
    how: str
    reassigned: tuple[Reassigned, ...] = ()

    @property
    def loss_spec(self) -> LossSpec:
        """What is needed to capture the same step without ``loss_fn``."""
        return LossSpec(
            region=replace(self.loss, calls=()),
            differentiated=self.differentiated,
            tangents=tuple(TensorSpec.of(n.meta["val"]) for n in self.tangents),
        )


def trace_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    target: Target | None = None,
) -> TracedStep:
    """Trace ``model`` on ``arguments`` (bound by name, see ``call_spec.bind_call``).

    First as it stands, which takes the very branches that eager takes; where
    that stops at a value that decides a branch, once more with
    ``torch.compiler.is_compiling()`` true, for which many libraries keep a
    branch-free path.

    Raises
    ------
    CaptureError
        When neither works; names the line of the model that stopped it.
    """
    target = target or target_of(model, tensors_of(arguments))
    attempts: list[tuple[str, Any]] = [
        ("as eager runs it", nullcontext),
        ("with torch.compiler.is_compiling()", _pretend_compiling),
    ]
    failures: list[tuple[str, BaseException]] = []
    for how, context in attempts:
        try:
            with (
                undisturbed(model, objects_of(arguments)),
                checkpoints_inlined(),
                _quiet_fake_tensors(),
                context(),
            ):
                return _trace(model, forward or model.forward, arguments, loss, how, target)
        except (NotFittingError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # whatever user code raises on stand-ins ends this attempt
            logger.debug("capture %s failed", how, exc_info=True)
            failures.append((how, error))
    raise CaptureError(_explain(failures)) from failures[-1][1]


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """What fails on fake tensors is raised; torch writes it to stderr as well."""
    its_logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = its_logger.level
    its_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        its_logger.setLevel(before)


@contextmanager
def _pretend_compiling() -> Iterator[None]:
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _trace(
    model: nn.Module,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None,
    how: str,
    target: Target,
) -> TracedStep:
    recorder = Recorder()
    try:
        return _trace_with(recorder, model, forward, arguments, loss, how, target)
    except Exception as error:
        if recorder.failed_at:
            error.add_note(recorder.failed_at)
        raise


def _trace_with(
    recorder: Recorder,
    model: nn.Module,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None,
    how: str,
    target: Target,
) -> TracedStep:
    _refuse_scripts(model)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    twins = StandIns(fake_mode, target)
    leaves: list[tuple[Node, torch.Tensor]] = []

    def declare(fake: torch.Tensor, role: str, targets: tuple[str, ...]) -> torch.Tensor:
        node = recorder.placeholder(
            _identifier(role, targets[0]), fake, role=role, target=targets[0], targets=targets
        )
        if fake.requires_grad:
            leaves.append((node, fake))
        return fake

    stand_ins = {
        id(tensor): declare(twins.of(tensor), role, names) for role, tensor, names in _state(model)
    }
    # Each argument gets a stand-in of its own: two arguments that are one tensor in the sample
    # need not be one in the next call.
    if any(id(t) in stand_ins for t in tensors_of(arguments)):
        raise NotFittingError("an argument is a parameter or buffer of the model itself")
    _refuse_holders(arguments)
    fake_arguments = twins.of_arguments(arguments)
    for i, tensor in enumerate(tensors_of(fake_arguments)):
        declare(tensor, "input", (str(i),))
    swap_tensors(model, lambda tensor: stand_ins[id(tensor)])
    state_before = _registered(model)
    numbers_before = _numbers(model)

    with (
        torch.autograd.set_multithreading_enabled(False),
        torch.enable_grad(),
        fake_mode,
    ):
        with recorder, recorder.module_paths(model):
            output = call_forward(forward, fake_arguments)
        if recorder.draws_outside is not None:
            raise NotFittingError(
                f"forward draws from Python's or NumPy's random generator (in module "
                f"{recorder.draws_outside!r}): a plan would repeat this one draw for ever. Draw "
                "with torch, or outside and pass the numbers as an argument"
            )
        _refuse_holders(fake_arguments)
        template, tensors = take_apart(output)
        reassigned = _reassigned(state_before, _registered(model))
        changed = _changed(numbers_before, _numbers(model))
        if changed:
            numbers_before = _numbers(model)
            call_forward(forward, fake_arguments)
            _refuse_counters(changed & _changed(numbers_before, _numbers(model)))
        differentiated, tangents, region = differentiate(output, template, tensors, loss, recorder)
        tangent_nodes = tuple(
            recorder.placeholder(f"tangent_{i}", tangent, role="tangent", target=str(i))
            for i, tangent in enumerate(tangents)
        )
        recorder.phase = "backward"
        with recorder, without_autocast():
            found = torch.autograd.grad(
                [tensors[i] for i in differentiated],
                [leaf for _, leaf in leaves],
                tangents,
                allow_unused=True,
            )
            gradients = _settle_gradients(leaves, found, tensors, recorder)

    outputs = tuple(recorder.node_of(t) for t in (*tensors, *(new for _, new, _ in reassigned)))
    recorder.graph.output((list(outputs), [g for _, g in gradients]))
    return TracedStep(
        graph=recorder.graph,
        outputs=outputs,
        template=template,
        differentiated=tuple(differentiated),
        tangents=tangent_nodes,
        gradients=tuple(gradients),
        constants=recorder.constants,
        loss=region,
        detached=tuple(
            i for i, t in enumerate(tensors) if t.requires_grad and i not in differentiated
        ),
        how=how,
        reassigned=tuple(
            Reassigned(target=name, output=len(tensors) + i, keeps_object=keeps)
            for i, (name, _, keeps) in enumerate(reassigned)
        ),
    )


def _refuse_scripts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotFittingError(
                f"module {name!r} is a TorchScript module, whose parameters cannot be exchanged "
                "for stand-ins; plan the Python module that it was made from"
            )


def _refuse_holders(arguments: Mapping[str, Any]) -> None:
    """An argument that hides tensors, such as a key-value cache, would freeze them."""
    for argument in objects_of(arguments):
        if tensors_within(argument):
            raise NotFittingError(
                f"an argument of type {type(argument).__name__} holds tensors, or forward puts "
                "some into it; pass the tensors themselves, or none of it (use_cache=False)"
            )


def _numbers(model: nn.Module) -> dict[str, float]:
    """Plain numbers among the attributes of modules."""
    return {
        f"{path}.{key}" if path else key: value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _changed(before: Mapping[str, float], after: Mapping[str, float]) -> set[str]:
    return {name for name in before if name in after and before[name] != after[name]}


def _refuse_counters(names: set[str]) -> None:
    """A number that is another one after each forward, which a planned step would not be."""
    if names:
        raise NotFittingError(
            f"forward counts in attribute {min(names)!r}, and a plan would repeat what it computed "
            "from one count for ever; keep it in a buffer, or count in the training loop"
        )


_Registered = dict[str, tuple[str, torch.Tensor, int]]


def _registered(model: nn.Module) -> _Registered:
    """Role, tensor and storage of every parameter and buffer by name, in each of its places."""
    return {
        f"{path}.{key}" if path else key: (role, tensor, storage_id(tensor))
        for path, module in model.named_modules()
        for role, table in (("parameter", module._parameters), ("buffer", module._buffers))
        for key, tensor in table.items()
        if tensor is not None
    }


def _reassigned(before: _Registered, after: _Registered) -> list[tuple[str, torch.Tensor, bool]]:
    """Name and new value of the buffers that forward replaced, and whether the object stayed."""
    changed = set(before) ^ set(after)
    if changed:
        raise NotFittingError(
            f"forward registers or removes {min(changed)!r}; a plan needs a model that keeps its "
            "parameters and buffers. If only the first call does so, run the model once before"
        )
    found = []
    for name, (role, old, old_memory) in before.items():
        _, new, new_memory = after[name]
        if new is old and new_memory == old_memory:
            continue
        if role == "parameter":
            raise NotFittingError(f"forward replaces parameter {name!r}; change it in the loop")
        if new.requires_grad:
            raise NotFittingError(
                f"forward replaces buffer {name!r} by a tensor that requires grad, which would "
                "carry the graph of one step into the next; detach it"
            )
        if (new.shape, new.dtype, new.stride()) != (old.shape, old.dtype, old.stride()):
            raise NotFittingError(
                f"forward replaces buffer {name!r}, a {TensorSpec.of(old)}, by a "
                f"{TensorSpec.of(new)}; each step would need a plan of its own"
            )
        found.append((name, new, new is old))
    return found


def _state(model: nn.Module) -> list[tuple[str, torch.Tensor, tuple[str, ...]]]:
    """Every parameter and buffer once, with all the names that it has."""
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for role, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            first.setdefault(id(tensor), (role, tensor))
            names.setdefault(id(tensor), []).append(name)
    return [(role, tensor, tuple(names[key])) for key, (role, tensor) in first.items()]


def _identifier(role: str, target: str) -> str:
    return f"{role}_{target}".replace(".", "_")


def _dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one block of memory without gap or overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _settle_gradients(
    leaves: list[tuple[Node, torch.Tensor]],
    found: tuple[torch.Tensor | None, ...],
    outputs: list[torch.Tensor],
    recorder: Recorder,
) -> list[tuple[Node, Node]]:
    """Copy the gradients that autograd would copy, so that the copies are in the graph.

    ``AccumulateGrad`` takes a gradient over as it is when nothing else holds
    its memory and its layout is the parameter's; it clones it otherwise
    (torch/csrc/autograd/functions/accumulate_grad.h).
    """
    taken = {storage_id(t) for t in outputs}
    taken |= {storage_id(node.meta["val"]) for node in recorder.graph.find_nodes(op="placeholder")}
    settled = []
    for (node, leaf), gradient in zip(leaves, found, strict=True):
        if gradient is None:
            continue
        if node.meta["role"] == "parameter":
            fits = gradient.stride() == leaf.stride() if _dense(leaf) else gradient.is_contiguous()
            if storage_id(gradient) in taken or not fits or not _owns_all(gradient):
                copy = torch.empty_like(leaf, memory_format=torch.preserve_format)
                gradient = copy.copy_(gradient)
            taken.add(storage_id(gradient))
        settled.append((node, recorder.node_of(gradient)))
    return settled


def _owns_all(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _explain(failures: list[tuple[str, BaseException]]) -> str:
    """What stopped each attempt, and what to do about it."""
    reasons: dict[str, list[str]] = {}
    for how, error in failures:
        where = _user_frame(error) or next(iter(getattr(error, "__notes__", ())), None)
        first = next(iter(str(error).strip().splitlines()), "")
        name = "" if isinstance(error, CaptureError) else f"{type(error).__name__}: "
        reasons.setdefault(f"{name}{first}{f' (at {where})' if where else ''}", []).append(how)
    lines = ["the model could not be captured as one graph:"]
    lines += [f"  {' and '.join(ways)}: {reason}" for reason, ways in reasons.items()]
    if any(isinstance(error, _DECIDED_BY_VALUE) for _, error in failures):
        lines.append(
            "  A branch or shape that depends on a tensor's value cannot be planned; write it with "
            "torch.where, pass the value as an argument, or plan the part of the model around it."
        )
    elif not any(isinstance(error, CaptureError) for _, error in failures):
        lines.append(
            "  Does an unplanned training step run, backward pass included? If it does, plan the "
            "part of the model around this line."
        )
    return "\n".join(lines)


def _user_frame(error: BaseException) -> str | None:
    from .recorder import _OWN_ROOT, _TORCH_ROOT

    place = None
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((_TORCH_ROOT, _OWN_ROOT, "<")):
            place = f"{name}:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return place
