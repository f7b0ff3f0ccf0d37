"""Record a step in which chosen modules stand for themselves: one operator each way.

What such a module computes is captured apart, once for all that are alike. In the step
around it, its call is an autograd function that makes outputs of the right form and
later gradients of the right form, so that everything else of the step, and the time at
which everything else lives, is recorded as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ..calls.autocast import AutocastState
from ..calls.call_spec import bind_call, describe, tensors_of
from ..errors import CaptureError
from ..private_torch.autograd import sequence_number_of
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.sharding import whole_of
from ..recording.outputs import tensors_within
from ..tracing.checkpointing import inside_checkpoint
from .call_values import CallValues
from .opaque_form import OpaqueForm, fresh_tensors, placed

NAMESPACE = "remat_blocks"
FORWARD = f"{NAMESPACE}.forward_call.default"
BACKWARD = f"{NAMESPACE}.backward_call.default"

Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class SeenCall:
    """A call that stood for itself.

    Parameters
    ----------
    path
        The module.
    number
        Which call of the step; the two operators have it as an argument.
    arguments
        The call by name, tensors as ``TensorSpec``.
    form
        Its form.
    """

    path: str
    number: int
    arguments: Mapping[str, Any]
    form: OpaqueForm


class UnknownFormError(BaseException):
    """Ends a capture at the first call whose form is not known.

    Not an ``Exception``, since a capture goes on after those in another way.
    """

    def __init__(
        self,
        path: str,
        arguments: Mapping[str, Any],
        autocast: AutocastState,
        values: CallValues | None,
    ) -> None:
        super().__init__(path)
        self.path = path
        self.arguments = arguments
        self.autocast = autocast
        self.values = values


class CheckpointedCallError(BaseException):
    """Ends a capture at a call that ``torch.utils.checkpoint`` would make again in backward.

    Not an ``Exception``, for the same reason.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Making(Protocol):
    """Makes what a call that stands for itself returns."""

    def values_of(self, arguments: Mapping[str, Any]) -> CallValues | None:
        """Return the real values of a call that is about to be made, if it has any."""

    def called(self, call: SeenCall, forward: Forward, arguments: Mapping[str, Any]) -> None:
        """Is told of a call of a module's own forward, before anything of it is made."""

    def outputs(self, number: int, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs that the call makes, in the order of its form."""

    def gradients(
        self, number: int, tangents: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the gradients that the call makes, in the order of its form."""


class AsOperators:
    """Makes tensors without values by one operator each way, for a step on stand-ins."""

    def values_of(self, arguments: Mapping[str, Any]) -> CallValues | None:
        """Return nothing: stand-ins have no values."""
        return None

    def called(self, call: SeenCall, forward: Forward, arguments: Mapping[str, Any]) -> None:
        """Do nothing: values play no part."""

    def outputs(self, number: int, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See :class:`Making`."""
        made: list[torch.Tensor] = _forward_call(list(given), number)
        return made

    def gradients(
        self, number: int, tangents: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """See :class:`Making`."""
        made: list[torch.Tensor] = _backward_call([*tangents, *given], number)
        return made


FormOf = Callable[[str, Mapping[str, Any], AutocastState, CallValues | None], OpaqueForm | None]


class OpaqueCalls:
    """Lets modules stand for themselves while a step is captured.

    Parameters
    ----------
    modules
        By path.
    form_of
        Returns the form of a module's call under an autocast, with its values if it has any,
        or ``None`` where it is not known.
    torch_type
        The device type whose autocast counts.
    making
        Makes what they return.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        form_of: FormOf,
        torch_type: str,
        making: Making | None = None,
    ) -> None:
        self.making = making or AsOperators()
        self._modules = modules
        self._form_of = form_of
        self._torch_type = torch_type
        self.seen: list[SeenCall] = []
        self.without_gradient: dict[int, set[int]] = {}  # outputs of a call
        self.out_of_order: dict[int, int | str] = {}  # a leaf of a call
        self._nodes: dict[int, Any] = {}  # autograd's nodes of the calls

    def around(self, forward: Forward) -> Forward:
        """Return the model's forward with the modules standing for themselves inside it."""

        @wraps(forward)
        def standing_in(*args: Any, **kwargs: Any) -> Any:
            with self.standing_in():
                output = forward(*args, **kwargs)
                self.look_at(output)
                return output

        return standing_in

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While active, the modules make nothing but their form; what was seen is forgotten."""
        self.seen.clear()
        self.without_gradient.clear()
        self.out_of_order.clear()
        self._nodes.clear()
        before = {path: vars(m).get("forward") for path, m in self._modules.items()}
        try:
            for path, module in self._modules.items():
                vars(module)["forward"] = self._stand_in(path, module)
            yield
        finally:
            for path, module in self._modules.items():
                if before[path] is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = before[path]

    def forget(self) -> None:
        """Let go of the forms that the operators look up."""
        for call in self.seen:
            _FORMS.pop(call.number, None)

    def _stand_in(self, path: str, module: nn.Module) -> Forward:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if module.training and inside_checkpoint():  # a reentrant one disables gradients
                raise CheckpointedCallError(path)
            if not module.training or not torch.is_grad_enabled():
                return own(*args, **kwargs)
            arguments = bind_call(own, args, kwargs)
            spec = describe(arguments)
            autocast = AutocastState.of(self._torch_type)
            with disable_current_modes():  # what is compared is no part of the step
                values = self.making.values_of(arguments)
                form = self._form_of(path, spec, autocast, values)
            if form is None:
                raise UnknownFormError(path, spec, autocast, values)
            del values
            number = len(self.seen)
            _FORMS[number] = form
            call = SeenCall(path=path, number=number, arguments=spec, form=form)
            self.seen.append(call)
            self.making.called(call, own, arguments)
            given = tensors_of(arguments)
            leaves = [
                given[leaf] if isinstance(leaf, int) else module.get_parameter(leaf)
                for leaf in form.leaves
            ]
            made = _Opaque.apply(self, number, len(leaves), *leaves, *given)
            outputs = list(made)
            self._nodes[number] = made[form.differentiated[0]].grad_fn
            for i, out in enumerate(form.outputs):
                if out.given is not None and i not in form.differentiated:
                    outputs[i] = given[out.given]
            return form.template.build(outputs)

        return forward

    def look_at(self, output: Any) -> None:
        """Note the calls whose gradients autograd would add up in another order than eager's.

        Eager adds the contributions of a module to a tensor's gradient one by one to those
        that are there already; a planned module adds up its own first. The two differ where
        another one that runs later in forward has contributed before, and where a module
        gets one tensor twice.

        Parameters
        ----------
        output
            What the model's forward returns.
        """
        differentiated = [t for t in tensors_within(output) if t.requires_grad]
        readers = _readers(map(get_gradient_edge, differentiated))
        for call in self.seen:
            node = self._nodes[call.number]
            own = list(node.next_functions[: len(call.form.leaves)])
            number = sequence_number_of(node)
            for i in call.form.summed:
                later = any(
                    reader is not node and (reader is None or sequence_number_of(reader) > number)
                    for reader in readers.get(own[i], ())
                )
                if later or own.count(own[i]) > 1:
                    self.out_of_order.setdefault(call.number, call.form.leaves[i])
        self._nodes.clear()

    def note_without_gradient(self, number: int, outputs: Sequence[int]) -> None:
        """Note outputs that no gradient has come back for."""
        self.without_gradient.setdefault(number, set()).update(outputs)


class _Opaque(torch.autograd.Function):
    """A call that makes its outputs, and later its gradients, out of nothing."""

    @staticmethod
    def forward(ctx: Any, calls: OpaqueCalls, number: int, num_leaves: int, *tensors: Any) -> Any:
        form = _FORMS[number]
        given = tensors[num_leaves:]
        ctx.calls, ctx.number = calls, number
        ctx.num_leaves, ctx.num_given = num_leaves, len(given)
        ctx.save_for_backward(*given)  # a planned call holds its arguments until its backward
        ctx.set_materialize_grads(False)
        fresh = calls.making.outputs(number, given)
        outputs = placed(form.outputs, fresh, given)
        ctx.mark_non_differentiable(
            *(t for i, t in enumerate(outputs) if i not in form.differentiated)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        form = _FORMS[ctx.number]
        tangents = [gradients[i] for i in form.differentiated]
        missing = [i for i in form.differentiated if gradients[i] is None]
        if missing:
            ctx.calls.note_without_gradient(ctx.number, missing)
            like = [form.outputs[i].spec for i in form.differentiated]
            tangents = [
                torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) if t is None else t
                for t, spec in zip(tangents, like, strict=True)
            ]
        fresh = ctx.calls.making.gradients(ctx.number, tangents, ctx.saved_tensors)
        made = [
            gradient if division is None else whole_of(gradient, division)
            for gradient, division in zip(
                placed(form.gradients, fresh, tangents), form.divisions, strict=True
            )
        ]
        return (None, None, None, *made, *([None] * ctx.num_given))


def _readers(edges: Iterable[Any]) -> dict[tuple[Any, int], list[Any]]:
    """The nodes that read each tensor on the way to some others; ``None`` is the loop."""
    readers: dict[tuple[Any, int], list[Any]] = {}
    todo: list[Any] = []
    for edge in edges:
        readers.setdefault((edge.node, edge.output_nr), []).append(None)
        todo.append(edge.node)
    seen = set(todo)
    while todo:
        node = todo.pop()
        for edge in node.next_functions:
            if edge[0] is None:
                continue
            readers.setdefault(edge, []).append(node)
            if edge[0] not in seen:
                seen.add(edge[0])
                todo.append(edge[0])
    return readers


# -- the two operators ---------------------------------------------------------------------

_FORMS: dict[int, OpaqueForm] = {}
_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("forward_call(Tensor[] given, int number) -> Tensor[]")
_library.define("backward_call(Tensor[] given, int number) -> Tensor[]")


def _fake_forward(given: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    return fresh_tensors(_FORMS[number].outputs)


def _fake_backward(given: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    return fresh_tensors(_FORMS[number].gradients)


def _no_values(given: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    raise CaptureError("a module that stands for itself has no values")


torch.library.register_fake(f"{NAMESPACE}::forward_call", _fake_forward, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::backward_call", _fake_backward, lib=_library)
_library.impl("forward_call", _no_values, "CompositeExplicitAutograd")
_library.impl("backward_call", _no_values, "CompositeExplicitAutograd")
_forward_call = getattr(torch.ops, NAMESPACE).forward_call
_backward_call = getattr(torch.ops, NAMESPACE).backward_call
