"""Record one training step: state and arguments as inputs, forward, loss, backward.

The stages run in eager's order; each leaves what the next one needs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ..calls.call_spec import call_forward, objects_of, tensors_of
from ..calls.layouts import refuse_state
from ..calls.spread_out import is_gathered, local_part, refuse_divided
from ..calls.storage_id import storage_id
from ..costs.roofline import LONGEST_TRIAL_NS, Roofline
from ..costs.target import Target
from ..errors import NotFittingError
from ..loop.loss import LossFn, LossSpec, differentiate, without_autocast
from ..private_torch.fake_tensors import FakeTensorMode
from ..reads.addresses import addresses_refused
from ..reads.foreign_generators import new_generators_refused
from ..reads.isolation import swap_tensors
from ..reads.reading import Watcher
from ..recording.accumulated import settle_gradients
from ..recording.backward_walk import BackwardWalk, Differentiator, Engine, refuse_backward_hooks
from ..recording.eager_formulas import eager_formulas_taken
from ..recording.effects import Effects
from ..recording.fake_call_cache import FakeCallCache
from ..recording.fake_inputs import FakeInputs
from ..recording.module_state import (
    LaidOut,
    loose_tensors,
    reassigned_buffers,
    refuse_laid_out_anew,
    registered,
    state_of,
)
from ..recording.outputs import settle_numbers, take_apart, tensors_within
from ..recording.real_results import RealResults
from ..recording.recorder import Recorder
from ..values.outcomes import Outcome
from .scripted_functions import scripted_functions_said
from .traced_step import Reassigned, TracedStep


def record_step(
    watcher: Watcher,
    model: nn.Module,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    loss: LossFn | LossSpec | None,
    how: str,
    target: Target,
    outcomes: Sequence[Outcome] | None,
    *,
    releases_outputs: bool = False,
    computed: frozenset[int] = frozenset(),
) -> TracedStep:
    """Record one step of ``model`` on stand-ins as a graph.

    Parameters
    ----------
    watcher
        Notes what forward and backward read beside their arguments.
    how
        How forward runs, in words; stored in the step.
    outcomes
        As for :class:`~.recorder.Recorder`.
    releases_outputs
        Whether the loop lets go of the outputs once it has the loss.
    computed
        Tensors of the call, by index, that other modules of a larger step have computed.
    """
    differentiator: Differentiator = Engine()
    watching: AbstractContextManager[None] = nullcontext()
    if target.absent:
        refuse_backward_hooks(model)
        differentiator = walk = BackwardWalk()
        watching = walk.watching()
    recording = _Recording(watcher, model, arguments, differentiator, target, outcomes, computed)
    try:
        with watching:
            return recording.run(forward, loss, how, releases_outputs)
    except Exception as error:
        if recording.recorder.failed_at:
            error.add_note(recording.recorder.failed_at)
        raise
    finally:
        recording.recorder.let_go()


class _Recording:
    """The stages of :func:`record_step`, with what they share."""

    def __init__(
        self,
        watcher: Watcher,
        model: nn.Module,
        arguments: Mapping[str, Any],
        differentiator: Differentiator,
        target: Target,
        outcomes: Sequence[Outcome] | None,
        computed: frozenset[int],
    ) -> None:
        self.computed = computed
        self.watcher = watcher
        self.model = model
        self.arguments = arguments
        self.differentiator = differentiator
        self.target = target
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.twins = FakeInputs(self.fake_mode, target)
        real = _real_results(self.fake_mode, target)
        self.recorder = Recorder(
            differentiator.current_node,
            FakeCallCache(self.fake_mode, real),
            lambda: watcher.look_at_stack(sys._getframe(2), __file__),
            outcomes,
            self.twins.of,
            real,
        )
        self.leaves: list[tuple[Node, torch.Tensor]] = []  # tensors whose gradients are wanted
        self.stand_ins: dict[int, torch.Tensor] = {}  # id of a tensor of the model -> its twin
        self.laid_out: list[LaidOut] = []  # parameters, buffers, attributes and arguments

    def run(
        self,
        forward: Callable[..., Any],
        loss: LossFn | LossSpec | None,
        how: str,
        releases_outputs: bool,
    ) -> TracedStep:
        model, recorder, watcher = self.model, self.recorder, self.watcher
        _refuse_scripts(model)
        self._declare_state()
        fake_arguments, given, nodes = self._declare_arguments()
        wanted = [tensor.requires_grad for tensor in given]
        swap_tensors(model, lambda tensor: self.stand_ins.get(id(tensor), tensor))
        state_before, modules_before = registered(model), dict(model.named_modules())
        effects = Effects(model, fake_arguments, objects_of(fake_arguments), watcher, recorder)

        with (
            torch.autograd.set_multithreading_enabled(False),
            torch.enable_grad(),
            self.fake_mode,
        ):
            with (
                watcher.watching(),
                recorder,
                recorder.module_paths(model),
                new_generators_refused(),
                addresses_refused(),
                scripted_functions_said(),
                self._eager_formulas(),
            ):
                output = call_forward(forward, fake_arguments)
                settle_numbers(output)
                effects.settle_numbers()
            self._refuse_random_numbers()
            refuse_laid_out_anew(self.laid_out)
            _refuse_holders(fake_arguments)
            _refuse_new_modules(modules_before, dict(model.named_modules()))
            template, tensors = take_apart(output)
            refuse_divided(tensors, template.names, "output")
            reassigned = reassigned_buffers(state_before, registered(model))
            made_to_require = [i for i, t in enumerate(given) if t.requires_grad and not wanted[i]]
            self.leaves += [(nodes[i], given[i]) for i in made_to_require]
            _refuse_graphs(self.stand_ins.values(), [given[i] for i in made_to_require])
            attributes = effects.left_tensors()

            def call_again() -> None:
                with recorder.knowing():  # takes the same branches as the recorded call
                    call_forward(forward, fake_arguments)

            left, watcher.settled = effects.settle(call_again)
            recorder.questions.look_ahead(
                {name: new for name, new, _ in reassigned}
                | {entry.target: entry.tensor for entry in attributes}
            )
            replaced = [(name, new, keeps, "buffer") for name, new, keeps in reassigned]
            replaced += [(entry.target, entry.tensor, False, "attribute") for entry in attributes]
            differentiated, tangents, region = differentiate(
                output,
                template,
                tensors,
                loss,
                self.differentiator,
                self.twins.of if self.target.elsewhere else None,
                lambda tensor: recorder.questions.values.tensor(recorder.node_of(tensor)),
                recorder.real,
                self._named,
                self._stays([new for _, new, *_ in replaced]) if releases_outputs else None,
            )
            before_backward = effects.remembered()  # a loop calls its loss itself
            tangent_nodes = tuple(
                recorder.placeholder(f"tangent_{i}", tangent, role="tangent", target=str(i))
                for i, tangent in enumerate(tangents)
            )
            gradients, arrivals = self._backward(
                [tensors[i] for i in differentiated], tangents, tensors
            )
            recorder.questions.finish()
            recorder.check_generators()
            effects.refuse_in_backward(before_backward)

        numbers = {entry.target for entry in attributes if entry.is_number}
        outputs = tuple(recorder.node_of(t) for t in (*tensors, *(new for _, new, *_ in replaced)))
        recorder.graph.output((list(outputs), [g for _, g in gradients]))
        return TracedStep(
            graph=recorder.graph,
            outputs=outputs,
            template=template,
            differentiated=tuple(differentiated),
            tangents=tangent_nodes,
            gradients=tuple(gradients),
            arrivals=tuple(arrivals),
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
                    is_number=name in numbers,
                )
                for i, (name, new, keeps, role) in enumerate(replaced)
            ),
            left=tuple(left),
            made_to_require=tuple(made_to_require),
        )

    def _declare(
        self, fake: torch.Tensor, role: str, targets: tuple[str, ...], real: torch.Tensor | None
    ) -> Node:
        if real is not None:
            real = local_part(real)
        node = self.recorder.placeholder(
            _identifier(role, targets[0]),
            local_part(fake),
            real,
            role=role,
            target=targets[0],
            targets=targets,
        )
        self.laid_out.append(LaidOut.of(fake, f"{role} {targets[0]!r}"))
        if fake.requires_grad:
            self.leaves.append((node, fake))
        return node

    def _declare_state(self) -> None:
        """Declare parameters and buffers as inputs, and other tensors of the model if read."""
        padded = is_gathered(self.model)  # to shards of the same length, which is not the step's
        for role, tensor, names in state_of(self.model):
            refuse_state(tensor, f"{role} {names[0]!r}")
            twin = self.stand_ins[id(tensor)] = self.twins.of(tensor, with_rest=not padded)
            self._lend_attributes(tensor, twin)
            self._declare(self.stand_ins[id(tensor)], role, names, tensor)
        # Each argument gets its own stand-in: two arguments that are the same tensor in the sample
        # may differ in the next call.
        if any(id(t) in self.stand_ins for t in tensors_of(self.arguments)):
            raise NotFittingError("an argument is a parameter or buffer of the model itself")
        loose = loose_tensors(self.model)
        state = (*self.model.parameters(), *self.model.buffers(), *(t for t, _ in loose))
        memory = Counter(map(storage_id, state))
        for tensor, names in loose:
            if len(names) == 1 and memory[storage_id(tensor)] == 1:
                self.watcher.replaceable.add(names[0])
            fake = self.stand_ins[id(tensor)] = self.twins.of(tensor)
            self._lend_attributes(tensor, fake)
            self.laid_out.append(LaidOut.of(fake, f"attribute {names[0]!r}"))
            self.recorder.expect(
                _identifier("attribute", names[0]),
                fake,
                tensor,
                role="attribute",
                target=names[0],
                targets=names,
            )

    def _lend_attributes(self, tensor: torch.Tensor, twin: torch.Tensor) -> None:
        """Let a stand-in answer for what the loop has put on a parameter or buffer."""
        self.watcher.let_stand_for(twin, tensor)
        for name, value in vars(tensor).items():
            vars(twin).setdefault(name, value)

    def _declare_arguments(self) -> tuple[Mapping[str, Any], list[torch.Tensor], list[Node]]:
        """The call on stand-ins, its tensors, and their nodes."""
        _refuse_holders(self.arguments)
        fake_arguments = self.twins.of_arguments(self.arguments)
        real = tensors_of(self.arguments)  # empty if only their specifications are known
        given = tensors_of(fake_arguments)
        for twin, tensor in zip(given, real, strict=False):
            self.watcher.of_call[id(twin)] = tensor
        nodes = [
            self._declare(tensor, "input", (str(i),), real[i] if real else None)
            for i, tensor in enumerate(given)
        ]
        for i in self.computed:
            nodes[i].meta["computed"] = True
        return fake_arguments, given, nodes

    def _backward(
        self,
        differentiated: list[torch.Tensor],
        tangents: list[torch.Tensor],
        tensors: list[torch.Tensor],
    ) -> tuple[list[tuple[Node, Node]], list[tuple[int, Node]]]:
        """Gradients of all leaves, as autograd leaves them behind, and when they arrived."""
        self.recorder.phase = "backward"
        nodes = self.recorder.graph.nodes
        arrivals: dict[Node, tuple[int, Node]] = {}  # by the leaf's node

        def arrived(i: int) -> None:
            arrivals[self.leaves[i][0]] = len(arrivals), next(iter(reversed(nodes)))

        with (
            self.watcher.watching(),
            self.recorder,
            without_autocast(),
            self._eager_formulas(),
        ):
            found = self.differentiator.grad(
                differentiated, [leaf for _, leaf in self.leaves], tangents, arrived=arrived
            )
            gradients = settle_gradients(self.leaves, found, tensors, self.recorder)
        return gradients, [arrivals[leaf] for leaf, _ in gradients]

    def _stays(self, replaced: Iterable[torch.Tensor]) -> Callable[[int], bool]:
        """Whether a memory comes from outside of the step or stays in the model after it."""
        placeholders = self.recorder.graph.find_nodes(op="placeholder")
        lasting = {storage_id(node.meta["val"]) for node in placeholders}
        return (lasting | {storage_id(t) for t in replaced}).__contains__

    def _named(self, tensor: torch.Tensor) -> str | None:
        """What a tensor is in the model or its call, in words."""
        if any(tensor is argument for argument in tensors_of(self.arguments)):
            return "a tensor that the model is called with"
        stand_in = self.stand_ins.get(id(tensor), tensor)
        for node, leaf in self.leaves:
            if stand_in is leaf:
                return f"{node.meta['role']} {node.meta['target']!r} of the model"
        return None

    def _eager_formulas(self) -> AbstractContextManager[None]:
        """Take eager's formulas under PyTorch's engine; the walk takes them by itself."""
        engine = isinstance(self.differentiator, Engine)
        return eager_formulas_taken() if engine else nullcontext()

    def _refuse_random_numbers(self) -> None:
        self.recorder.check_generators()
        draws_outside = self.recorder.generators.draws_outside
        if draws_outside is not None:
            raise NotFittingError(
                f"forward draws from Python's or NumPy's random generator (in module "
                f"{draws_outside!r}): a plan would repeat this one draw for ever. "
                "Draw with torch, or outside and pass the numbers as an argument"
            )
        self.watcher.generators.refuse_draws()
        self.watcher.elsewhere.refuse_draws()


def _real_results(fake_mode: FakeTensorMode, target: Target) -> RealResults | None:
    """The layout of the kernels' results, if the step's device is at hand."""
    here = target.torch_type == "cpu" or torch.cuda.is_available()
    if not (target.at_hand and here):
        return None
    roofline = Roofline(target.device)
    return RealResults(
        fake_mode,
        target.torch_device,
        too_long=lambda call: roofline.time_ns(call) > LONGEST_TRIAL_NS,
    )


def _refuse_scripts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotFittingError(
                f"module {name!r} is a TorchScript module, whose parameters cannot be exchanged "
                "for stand-ins; plan the Python module that it was made from"
            )


def _refuse_new_modules(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> None:
    """Refuse a change of modules: a planned step has the modules that it was captured with."""
    for name in (*before, *after):
        if before.get(name) is not after.get(name):
            raise NotFittingError(
                f"forward puts another module in the place of {name!r}, or adds or removes it, "
                "which a planned step would not do; if only the first call does so, run the "
                "model once before planning"
            )


def _refuse_graphs(state: Iterable[torch.Tensor], arguments: Iterable[torch.Tensor]) -> None:
    """Refuse in-place writes that make a buffer or an argument a result of this step's graph."""
    if any(not t.is_leaf for t in (*state, *arguments)):
        raise NotFittingError(
            "forward writes values that require grad into a buffer or into one of its arguments, "
            "which would carry the graph of one step into the next; write detached values, or "
            "into a copy"
        )


def _refuse_holders(arguments: Mapping[str, Any]) -> None:
    """Refuse an argument that hides tensors, like a key-value cache: a plan would freeze them."""
    for argument in objects_of(arguments):
        if tensors_within(argument):
            raise NotFittingError(
                f"an argument of type {type(argument).__name__} holds tensors, or forward puts "
                "some into it; pass the tensors themselves, or none of it (use_cache=False)"
            )


def _identifier(role: str, target: str) -> str:
    return f"{role}_{target}".replace(".", "_")
