"""Trace a training step, forward, loss and backward, into one torch.fx graph.

The model runs once on fake tensors under :class:`~graph_capture.recorder.Recorder`,
autograd included, so the graph holds the very calls that eager dispatches.
Nothing is allocated, and the model is left as it was.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
)
from torch.fx import Graph, Node

from .absent_cuda import ensure_cuda_guard
from .backward_walk import BackwardWalk, Differentiator, Engine, refuse_backward_hooks
from .before_checks import BeforeChecks, before_checks
from .call_spec import call_forward, objects_of, tensors_of
from .checkpointing import checkpoints_inlined
from .checks import Check
from .costs.roofline import LONGEST_TRIAL_NS, Roofline
from .cuda_choices import choices_of_cuda, refuse_recurrent
from .eager_formulas import take_eager_formulas
from .effects import Effects, LeftValue
from .errors import CaptureError, NotFittingError
from .failures import explain_failures
from .isolation import swap_tensors, undisturbed
from .known_values import taken_for_real
from .ledger import Change, make_again
from .loss import LossFn, LossRegion, LossSpec, differentiate, without_autocast
from .module_state import (
    loose_tensors,
    reassigned_buffers,
    registered,
    state_of,
)
from .outcomes import Outcome, read_as_a_whole
from .outputs import OutputTemplate, take_apart, tensors_within
from .packed_sequences import sequences_padded
from .reading import Watcher
from .reads import Reads
from .real_results import RealResults
from .recorder import Recorder, storage_id
from .repeated_calls import RepeatedCalls
from .snapshots import brief
from .stand_ins import StandIns
from .target import Target, target_of
from .tensor_of_tensors import tensors_of_tensors

logger = logging.getLogger(__name__)


AS_EAGER = "as eager runs it"
COMPILING = "with torch.compiler.is_compiling()"


@dataclass(frozen=True, kw_only=True)
class TakenPath:
    """Which way an earlier capture went through the model.

    Parameters
    ----------
    branch_free
        As :attr:`TracedStep.branch_free`.
    outcomes
        What it was answered when it asked for values.
    """

    branch_free: bool
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class Reassigned:
    """A buffer or attribute that forward replaces, ``self.mean = 0.9 * self.mean + …``.

    Parameters
    ----------
    target
        Its name in the model.
    output
        Index into ``TracedStep.outputs`` of the new value.
    keeps_object
        Whether the tensor object stays and only its memory is exchanged
        (``self.mean.data = …``).
    role
        ``"buffer"`` or ``"attribute"``.
    requires_grad
        Whether eager's tensor does, which no plan can differentiate through.
    """

    target: str
    output: int
    keeps_object: bool
    role: str = "buffer"
    requires_grad: bool = False


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """One training step as a torch.fx graph.

    Parameters
    ----------
    graph
        Placeholders carry ``meta["role"]`` (parameter, buffer, attribute, input,
        constant, tangent) and ``meta["target"]``; calls carry ``val``, ``phase``,
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
    outcomes
        What forward was answered when it asked for values of tensors.
    checks
        What checks in the graph are about; their last argument is an index of it.
    reassigned
        Buffers and attributes that forward replaces.
    left
        Plain values that forward puts into attributes.
    made_to_require
        Which tensors of the call forward makes require grad.
    reads
        What forward and backward read beside all these, which must stay as it is.
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
    outcomes: tuple[Outcome, ...] = ()
    checks: tuple[Check, ...] = ()
    reassigned: tuple[Reassigned, ...] = ()
    left: tuple[LeftValue, ...] = ()
    made_to_require: tuple[int, ...] = ()
    reads: Reads = field(default_factory=Reads, compare=False)

    @property
    def branch_free(self) -> bool:
        """Whether libraries were told that a compiler is looking."""
        return self.how == COMPILING

    @property
    def taken(self) -> TakenPath:
        """The way through the model, for going it again."""
        return TakenPath(branch_free=self.branch_free, outcomes=self.outcomes)

    @cached_property
    def before_checks(self) -> BeforeChecks:
        """What must be put back when a check fails."""
        return before_checks(self.graph)

    @property
    def loss_spec(self) -> LossSpec:
        """What is needed to capture the same step without ``loss_fn``."""
        tangents = [n.meta["val"] for n in self.tangents]
        outputs = [n.meta["val"] for n in self.outputs]
        return LossSpec.of(self.loss, self.differentiated, tangents, outputs)


def trace_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    target: Target | None = None,
    taken: TakenPath | None = None,
) -> TracedStep:
    """Trace ``model`` on ``arguments`` (bound by name, see ``call_spec.bind_call``).

    First as it stands, which takes the very branches that eager takes on the
    sample; where that stops at a value that decides a branch and is not known,
    once more with ``torch.compiler.is_compiling()`` true, for which many
    libraries keep a branch-free path.

    Parameters
    ----------
    taken
        The path of an earlier capture, which this one takes, too.

    Raises
    ------
    CaptureError
        When neither works; names the line of the model that stopped it.
    """
    _refuse_layouts(tensors_of(arguments))
    target = target or target_of(model, tensors_of(arguments))
    forward = forward or model.forward

    def traced() -> tuple[TracedStep, list[Change]]:
        return _first_that_works(model, arguments, loss, forward, target, taken)

    step, settled = traced()
    if settled:
        with undisturbed(model, objects_of(arguments)):
            for change in settled:
                make_again(change)
            try:
                second, _ = traced()
            except CaptureError:  # half of a first call's changes: nothing follows from that
                logger.debug("a second call could not be captured", exc_info=True)
                return step
        if _calls_of(second) != _calls_of(step):
            name = f"{settled[0].label}.{settled[0].key}".lstrip(".")
            raise NotFittingError(
                f"the second call of forward does something else than the first, which sets "
                f"attribute {name!r} to {brief(settled[0].now)}; run the model once before planning"
            )
    return step


def _refuse_layouts(arguments: Iterable[torch.Tensor]) -> None:
    for tensor in arguments:
        if tensor.is_nested:
            raise NotFittingError(
                "an argument is a nested tensor; only dense tensors can be planned: pad it "
                "(torch.nested.to_padded_tensor) and pass the lengths or a mask, or plan the part "
                "of the model behind it"
            )
        if tensor.layout != torch.strided:
            raise NotFittingError(
                f"an argument is a tensor of layout {tensor.layout}; only dense tensors can be "
                "planned: pass it dense (to_dense()), pass indices and values and multiply with "
                "index_select and index_add, or plan the dense part of the model"
            )


def _calls_of(step: TracedStep) -> list[str]:
    return [f"{n.name} {n.target} {n.args} {n.kwargs}" for n in step.graph.nodes]


def _first_that_works(
    model: nn.Module,
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None,
    forward: Callable[..., Any],
    target: Target,
    taken: TakenPath | None,
) -> tuple[TracedStep, list[Change]]:
    """The step, and what forward changes once of what it reads."""
    if target.imitated:
        refuse_recurrent(model)
        ensure_cuda_guard()
    attempts: list[tuple[str, Any]] = [
        (AS_EAGER, taken_for_real),
        (COMPILING, _pretend_compiling),
    ]
    if taken is not None:
        attempts = [attempts[1 if taken.branch_free else 0]]
    outcomes = None if taken is None else taken.outcomes
    failures: list[tuple[str, BaseException]] = []
    for how, context in attempts:
        watcher = Watcher(model, forward, objects_of(arguments))
        try:
            with (
                undisturbed(model, objects_of(arguments)),
                checkpoints_inlined(),
                choices_of_cuda(target) if target.imitated else nullcontext(),
                torch.autograd.set_detect_anomaly(False),  # which asks for values of gradients
                _quiet_fake_tensors(),
                read_as_a_whole(),
                tensors_of_tensors(),
                sequences_padded(),
                context(),
            ):
                try:
                    step = _trace(watcher, model, forward, arguments, loss, how, target, outcomes)
                finally:
                    watcher.outside.put_back()
            # What was read is what lies there once forward's own changes are undone.
            return replace(step, reads=watcher.reads()), watcher.settled
        except (NotFittingError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # whatever user code raises on stand-ins ends this attempt
            logger.debug("capture %s failed", how, exc_info=True)
            failures.append((how, error))
    raise CaptureError(explain_failures(failures)) from failures[-1][1]


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
    watcher: Watcher,
    model: nn.Module,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None,
    how: str,
    target: Target,
    outcomes: Sequence[Outcome] | None,
) -> TracedStep:
    differentiator: Differentiator = Engine()
    watching: AbstractContextManager[None] = nullcontext()
    if target.absent:
        refuse_backward_hooks(model)
        differentiator = walk = BackwardWalk()
        watching = walk.watching()
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    twins = StandIns(fake_mode, target)
    real = _real_results(fake_mode, target)
    recorder = Recorder(
        differentiator.current_node,
        RepeatedCalls(fake_mode, real),
        lambda: watcher.look_at_stack(sys._getframe(2), __file__),
        outcomes,
        twins.of,
        real,
    )
    try:
        with watching:
            return _trace_with(
                recorder,
                watcher,
                differentiator,
                fake_mode,
                twins,
                model,
                forward,
                arguments,
                loss,
                how,
                target,
            )
    except Exception as error:
        if recorder.failed_at:
            error.add_note(recorder.failed_at)
        raise
    finally:
        recorder.let_go()


def _real_results(fake_mode: FakeTensorMode, target: Target) -> RealResults | None:
    """Where the step's device is at hand: how results of its kernels lie."""
    here = target.torch_type == "cpu" or torch.cuda.is_available()
    if not (target.at_hand and here):
        return None
    roofline = Roofline(target.device)
    return RealResults(
        fake_mode,
        target.torch_device,
        too_long=lambda call: roofline.time_ns(call) > LONGEST_TRIAL_NS,
    )


def _trace_with(
    recorder: Recorder,
    watcher: Watcher,
    differentiator: Differentiator,
    fake_mode: FakeTensorMode,
    twins: StandIns,
    model: nn.Module,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None,
    how: str,
    target: Target,
) -> TracedStep:
    _refuse_scripts(model)
    leaves: list[tuple[Node, torch.Tensor]] = []

    def declare_node(
        fake: torch.Tensor, role: str, targets: tuple[str, ...], real: torch.Tensor | None
    ) -> Node:
        node = recorder.placeholder(
            _identifier(role, targets[0]), fake, real, role=role, target=targets[0], targets=targets
        )
        if fake.requires_grad:
            leaves.append((node, fake))
        return node

    stand_ins: dict[int, torch.Tensor] = {}
    for role, tensor, names in state_of(model):
        stand_ins[id(tensor)] = twins.of(tensor)
        declare_node(stand_ins[id(tensor)], role, names, tensor)
    # Each argument gets a stand-in of its own: two arguments that are one tensor in the sample
    # need not be one in the next call.
    if any(id(t) in stand_ins for t in tensors_of(arguments)):
        raise NotFittingError("an argument is a parameter or buffer of the model itself")
    loose = loose_tensors(model)
    memory = Counter(
        map(storage_id, [*model.parameters(), *model.buffers(), *(t for t, _ in loose)])
    )
    for tensor, names in loose:
        if len(names) == 1 and memory[storage_id(tensor)] == 1:
            watcher.replaceable.add(names[0])
        fake = stand_ins[id(tensor)] = twins.of(tensor)
        name = _identifier("attribute", names[0])
        recorder.expect(name, fake, tensor, role="attribute", target=names[0], targets=names)
    _refuse_holders(arguments)
    fake_arguments = twins.of_arguments(arguments)
    real_arguments = tensors_of(arguments)  # none where only their kinds are known
    given = tensors_of(fake_arguments)
    nodes = [
        declare_node(tensor, "input", (str(i),), real_arguments[i] if real_arguments else None)
        for i, tensor in enumerate(given)
    ]
    wanted = [tensor.requires_grad for tensor in given]
    swap_tensors(model, lambda tensor: stand_ins.get(id(tensor), tensor))
    state_before = registered(model)
    effects = Effects(model, fake_arguments, objects_of(fake_arguments), watcher, recorder)

    with (
        torch.autograd.set_multithreading_enabled(False),
        torch.enable_grad(),
        fake_mode,
    ):
        with watcher.watching(), recorder, recorder.module_paths(model):
            output = call_forward(forward, fake_arguments)
        recorder.check_generators()
        if recorder.draws_outside is not None:
            raise NotFittingError(
                f"forward draws from Python's or NumPy's random generator (in module "
                f"{recorder.draws_outside!r}): a plan would repeat this one draw for ever. Draw "
                "with torch, or outside and pass the numbers as an argument"
            )
        _refuse_holders(fake_arguments)
        template, tensors = take_apart(output)
        reassigned = reassigned_buffers(state_before, registered(model))
        made_to_require = [i for i, t in enumerate(given) if t.requires_grad and not wanted[i]]
        leaves += [(nodes[i], given[i]) for i in made_to_require]
        _refuse_graphs(stand_ins.values(), [given[i] for i in made_to_require])
        attributes = effects.left_tensors()

        def call_again() -> None:
            with recorder.knowing():  # it takes the branches that the recorded one took
                call_forward(forward, fake_arguments)

        left, watcher.settled = effects.settle(call_again)
        before_backward = effects.remembered()
        differentiated, tangents, region = differentiate(
            output,
            template,
            tensors,
            loss,
            differentiator,
            twins.of if target.elsewhere else None,
            lambda tensor: recorder.questions.values.tensor(recorder.node_of(tensor)),
            recorder.real,
        )
        tangent_nodes = tuple(
            recorder.placeholder(f"tangent_{i}", tangent, role="tangent", target=str(i))
            for i, tangent in enumerate(tangents)
        )
        recorder.phase = "backward"
        if isinstance(differentiator, Engine):
            take_eager_formulas(tensors[i] for i in differentiated)
        with watcher.watching(), recorder, without_autocast():
            found = differentiator.grad(
                [tensors[i] for i in differentiated], [leaf for _, leaf in leaves], tangents
            )
            gradients = _settle_gradients(leaves, found, tensors, recorder)
        recorder.questions.finish()
        recorder.check_generators()
        effects.refuse_in_backward(before_backward)

    replaced = [(name, new, keeps, "buffer") for name, new, keeps in reassigned]
    replaced += [(entry.target, entry.tensor, False, "attribute") for entry in attributes]
    outputs = tuple(recorder.node_of(t) for t in (*tensors, *(new for _, new, *_ in replaced)))
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
        outcomes=tuple(recorder.questions.outcomes),
        checks=tuple(recorder.questions.checks),
        reassigned=tuple(
            Reassigned(
                target=name,
                output=len(tensors) + i,
                keeps_object=keeps,
                role=role,
                requires_grad=new.requires_grad,
            )
            for i, (name, new, keeps, role) in enumerate(replaced)
        ),
        left=tuple(left),
        made_to_require=tuple(made_to_require),
    )


def _refuse_scripts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotFittingError(
                f"module {name!r} is a TorchScript module, whose parameters cannot be exchanged "
                "for stand-ins; plan the Python module that it was made from"
            )


def _refuse_graphs(state: Iterable[torch.Tensor], arguments: Iterable[torch.Tensor]) -> None:
    """What forward writes to in place must not become a result of this step's graph."""
    if any(not t.is_leaf for t in (*state, *arguments)):
        raise NotFittingError(
            "forward writes values that require grad into a buffer or into one of its arguments, "
            "which would carry the graph of one step into the next; write detached values, or "
            "into a copy"
        )


def _refuse_holders(arguments: Mapping[str, Any]) -> None:
    """An argument that hides tensors, such as a key-value cache, would freeze them."""
    for argument in objects_of(arguments):
        if tensors_within(argument):
            raise NotFittingError(
                f"an argument of type {type(argument).__name__} holds tensors, or forward puts "
                "some into it; pass the tensors themselves, or none of it (use_cache=False)"
            )


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
