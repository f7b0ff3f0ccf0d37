"""Values that a loss reads while it runs on stand-ins.

The targets that a ``loss_fn`` brings along are real, so what is computed from them
alone is known: a mask made from them picks as many elements as in a real step. What
is computed from the model's output is known on the sample. That answers a question
about a number (is the loss finite?) but not about a size, because the memory of a
loss is counted once, for all steps.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..calls.collectives import filled_by
from ..costs.trial import REFUSALS, blank_arguments
from ..errors import NotFittingError
from ..private_torch.aten import local_scalar_dense
from ..private_torch.fake_tensors import FakeTensor
from ..private_torch.operators import schema_of
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter, tree_map
from .origins import LENGTHS_IN_LISTS, deciding, has_lengths_in_lists
from .outcomes import Outcome, made_like
from .sample_values import UnknowableError, for_real

_ADVICE = (
    "Keep the sizes (multiply by the mask, torch.where, reduction='none', ignore_index=), or "
    "compute this part of the loss in the model's forward"
)

_INTO_FORWARD = (
    "A planned step is one function, through which a loss cannot differentiate again. Move this "
    "part of the loss with its torch.autograd.grad into the model's forward, which returns what "
    "comes out: there it is planned"
)


class _Value:
    """What a tensor will be, computed on request; holds no stand-in."""

    def __init__(self, compute: Callable[[], Any], *, of_output: bool) -> None:
        self._compute: Callable[[], Any] | None = compute
        self._result: Any = None
        self.of_output = of_output

    def get(self) -> Any:
        if self._compute is not None:
            self._result, self._compute = self._compute(), None
        return self._result


class TrainersLoss(ABC):
    """A ``loss_fn`` that runs a trainer's own code.

    It reads numbers out of the output only to log them: while planning it is given a half,
    or one, for each, instead of having the model run for it. So it is with what a mask picks
    that is not differentiated: all of it, the most memory that it may take. Other sizes, and
    branches, still go by real values; other processes are taken to give what this one does.
    """

    @abstractmethod
    def __call__(self, output: Any) -> torch.Tensor:
        """Return the loss."""

    @abstractmethod
    def undoing(self) -> AbstractContextManager[None]:
        """What undoes all that calls within it do beside computing."""


class LossValues:
    """The values of the stand-ins in a loss computation.

    Parameters
    ----------
    logs_numbers
        Whether any number will do for one that follows from the output, see
        :class:`TrainersLoss`.
    """

    def __init__(self, *, logs_numbers: bool = False) -> None:
        self._logs_numbers = logs_numbers
        self._values: Any = WeakIdKeyDictionary()
        self._num_writes: dict[int, int] = {}  # to the memory of a storage

    def give(self, output: torch.Tensor, compute: Callable[[], torch.Tensor]) -> None:
        """Register how to compute the value of a model's output on the sample."""
        self._set(output, _Value(compute, of_output=True))

    def note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Record how a call made ``out``."""
        before = self._snapshot(args, kwargs)
        collected = filled_by(func, args, out) if self._logs_numbers else []
        given = [self._of(tensor) for _, tensor in collected]
        if schema_of(func).is_mutable:
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    memory = identity_of_storage(tensor.untyped_storage())
                    self._num_writes[memory] = self._num_writes.get(memory, 0) + 1
        for (filled, tensor), value in zip(collected, given, strict=True):
            if value is not None:
                self._set(tensor, value)
                filling = partial(_repeated, value, filled.shape)
                self._set(filled, _Value(filling, of_output=value.of_output))
        if before is None or torch.Tag.nondeterministic_seeded in func.tags:
            return
        if "empty" in schema_of(func).name or func.namespace != "aten":
            return
        value_args, value_kwargs, of_output = before
        copies = bool(schema_of(func).is_mutable)

        def compute() -> Any:
            return _run(func, value_args, value_kwargs, copies=copies)

        whole = _Value(compute, of_output=of_output)
        if isinstance(out, torch.Tensor):
            self._set(out, whole)
        elif isinstance(out, (tuple, list)):
            for i, tensor in enumerate(out):
                if isinstance(tensor, torch.Tensor):
                    self._set(tensor, _Value(partial(_item, whole, i), of_output=of_output))

    def answer(self, func: Any, args: tuple, kwargs: dict, error: Exception) -> Any:
        """Return the result of a call that reads values.

        Raises
        ------
        NotFittingError
            When the value is not known, or would be a size that differs in each step.
        """
        if has_lengths_in_lists(func):
            raise NotFittingError(LENGTHS_IN_LISTS) from error
        asks = deciding(func, args, kwargs)
        found = self._snapshot(asks, {})
        makes = any(str(r.type) == "Tensor" for r in schema_of(func).returns)
        if self._logs_numbers and func is local_scalar_dense.default:
            dtype = args[0].dtype
            if dtype != torch.bool and (found is None or found[2]):
                return 0.5 if dtype.is_floating_point else 1
        if makes and (found is None or found[2]):
            if self._logs_numbers and _picks_undifferentiated(args, kwargs, asks):
                return made_like(Outcome.of(self._compute(func, args, kwargs, _all)), func, args)
            raise NotFittingError(
                f"loss_fn makes a size out of values of the model's output ({func}), which each "
                f"step has others of. {_ADVICE}"
            ) from error
        if found is None:
            raise NotFittingError(
                f"loss_fn asks for a value that is not known while planning ({func}): {_ADVICE}"
            ) from error
        result = self._compute(func, args, kwargs)
        return made_like(Outcome.of(result), func, args) if makes else result

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return all values of a stand-in, on the CPU."""
        found = self._snapshot((tensor,), {})
        if found is None:
            return None
        ((value,), _, _) = found
        with for_real():
            return _get(value).detach().cpu().clone()

    def _compute(
        self,
        func: Any,
        args: tuple,
        kwargs: dict,
        value_of: Callable[[torch.Tensor], Any] | None = None,
    ) -> Any:
        asked = {id(t) for t in tree_iter(deciding(func, args, kwargs))}

        def value(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) not in asked:  # only its shape matters
                with for_real():
                    (blank,), _ = blank_arguments(
                        torch.ops.aten.clone.default, (x,), {}, torch.device("cpu")
                    )
                return _Value(lambda: blank, of_output=False)
            return (value_of or self._of)(x)

        return _run(func, tree_map(value, args), tree_map(value, kwargs), copies=False)

    def _snapshot(self, args: Any, kwargs: Any) -> tuple[Any, Any, bool] | None:
        """Arguments with values in place of tensors, and whether they depend on the output."""
        of_output = False
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                value = self._of(leaf)
                if value is None:
                    return None
                of_output |= value.of_output

        def known(x: Any) -> Any:
            return self._of(x) if isinstance(x, torch.Tensor) else x

        return tree_map(known, args), tree_map(known, kwargs), of_output

    def _of(self, tensor: torch.Tensor) -> _Value | None:
        if not isinstance(tensor, FakeTensor):
            return None if tensor.device.type == "meta" else _Value(lambda: tensor, of_output=False)
        found = self._values.get(tensor)
        if found is None:
            return None
        value, num_writes = found
        memory = identity_of_storage(tensor.untyped_storage())
        return value if self._num_writes.get(memory, 0) == num_writes else None

    def _set(self, tensor: torch.Tensor, value: _Value) -> None:
        memory = identity_of_storage(tensor.untyped_storage())
        self._values[tensor] = (value, self._num_writes.get(memory, 0))


def _picks_undifferentiated(args: tuple, kwargs: dict, asks: Any) -> bool:
    """Whether masks decide what a call returns, and no gradient goes through it."""
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    masks = [t for t in tree_iter(asks) if isinstance(t, torch.Tensor)]
    return all(mask.dtype == torch.bool for mask in masks) and not (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    )


def _all(mask: torch.Tensor) -> _Value:
    with for_real():
        picked = torch.ones(mask.shape, dtype=torch.bool)
    return _Value(lambda: picked, of_output=False)


def _item(whole: _Value, i: int) -> Any:
    return whole.get()[i]


def _repeated(value: _Value, shape: torch.Size) -> torch.Tensor:
    """As if every process gave this to a collective."""
    given = value.get().flatten()
    num_times = -(-shape.numel() // max(1, given.numel()))
    return given.repeat(num_times)[: shape.numel()].view(shape)


def _get(x: Any) -> Any:
    return x.get() if isinstance(x, _Value) else x


def _run(func: Any, args: Any, kwargs: Any, *, copies: bool) -> Any:
    def real(x: Any) -> Any:
        value = _get(x)
        return value.clone() if copies and isinstance(value, torch.Tensor) else value

    def placed(x: Any, device: torch.device) -> Any:
        return device if isinstance(x, torch.device) else x

    with for_real():
        try:
            given = tree_map(real, (args, kwargs))
            devices = (t.device for t in tree_iter(given) if isinstance(t, torch.Tensor))
            device = next(devices, torch.device("cpu"))
            real_args, real_kwargs = tree_map(partial(placed, device=device), given)
            return func(*real_args, **real_kwargs)
        except UnknowableError as error:
            raise NotFittingError(
                "loss_fn asks for a value of the model's output, which is not known where the "
                f"model or the sample is on meta: pass real ones. {_ADVICE}"
            ) from error
        except REFUSALS as error:
            raise NotFittingError(
                f"loss_fn asks for a value, and {func} does not run on the targets: {error}"
            ) from error


@contextmanager
def derivatives_through_model_refused(
    named: Callable[[torch.Tensor], str | None],
) -> Iterator[None]:
    """While active, refuse a loss that differentiates through the model, and say where it can.

    It may differentiate by its own weights: no part of the planned step lies between them
    and the loss.

    Parameters
    ----------
    named
        What a tensor is of the model or its call, in words; ``None`` for another one.
    """
    before: Any = torch.autograd.grad
    mine = threading.get_ident()  # others train models of their own

    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != mine:
            return before(outputs, inputs, *args, **kwargs)
        if not isinstance(inputs, torch.Tensor):
            inputs = tuple(inputs)
        for tensor in (inputs,) if isinstance(inputs, torch.Tensor) else inputs:
            name = named(tensor) if isinstance(tensor, torch.Tensor) else None
            if name is not None:
                raise NotFittingError(f"loss_fn differentiates by {name}. {_INTO_FORWARD}")
        try:
            return before(outputs, inputs, *args, **kwargs)
        except RuntimeError as error:
            if "allow_unused" not in str(error):
                raise
            # An input that forward hands back, or something that the input was made of.
            raise NotFittingError(
                "loss_fn differentiates by a tensor that what it differentiates depends on through "
                f"the model alone, if at all. {_INTO_FORWARD}"
            ) from error

    torch.autograd.grad = grad
    try:
        yield
    finally:
        torch.autograd.grad = before


__all__ = ["LossValues", "TrainersLoss", "derivatives_through_model_refused"]
