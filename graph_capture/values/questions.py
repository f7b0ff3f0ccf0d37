"""Answer traced code that reads a tensor's value.

The value is that on the sample, so that the capture takes the branch that eager takes
there. A check goes into the graph at this point, because another step may have
another value. The plan holds for the answer, not for the values behind it: that
``labels.max() >= vocab_size`` is false holds for all sensible labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.fx import Graph, Node

from ..calls.call_places import calling_line
from ..errors import AskedInBackwardError, CaptureError
from ..private_torch.aten import local_scalar_dense
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.trees import tree_iter
from . import checks
from .asked_numbers import AskedNumber
from .checks import Check
from .next_step import Asked, by_chance, prepared
from .origins import (
    LENGTHS_IN_LISTS,
    Origins,
    deciding,
    has_lengths_in_lists,
    written_after,
)
from .outcomes import GivenOutcomes, Outcome, made_like, read_like
from .sample_values import SampleValues, UnknowableError

aten = torch.ops.aten


class Recording(Protocol):
    """The part of a recorder that the answers need."""

    graph: Graph
    constants: dict[str, torch.Tensor]
    phase: str

    def node_of(self, tensor: torch.Tensor) -> Node: ...
    def lies_in_state(self, tensor: torch.Tensor) -> bool: ...
    def as_nodes(self, tree: Any) -> Any: ...
    def origin(self) -> tuple[str, str]: ...
    def call(self, func: Any, args: Any, kwargs: Any) -> Node: ...
    def bind(self, node: Node, tensor: torch.Tensor) -> None: ...
    def record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None: ...


class Questions:
    """Answers for the calls of one recorder that fake tensors cannot answer.

    Parameters
    ----------
    recorder
        The recorder that is asked; it gets the checks.
    given
        The answers of an earlier capture; ``None`` to ask the sample.
    """

    def __init__(self, recorder: Recording, given: GivenOutcomes | None) -> None:
        self._recorder = recorder
        self._given = given
        self.values = SampleValues(recorder.graph, recorder.constants)
        self.outcomes: list[Outcome] = []
        self.checks: list[Check] = []
        self.unknown: list[bool] = []  # of the numbers handed out by ``.item()``
        self._of_state: list[Asked] = []

    def asked_number(self, tensor: torch.Tensor) -> AskedNumber:
        """Return the number in a tensor, whose value may never be read."""
        node = self._recorder.node_of(tensor)
        last = next(iter(reversed(self._recorder.graph.nodes)))
        unknown = self.values.follows_from(node).is_activation
        self.unknown.append(unknown)
        number = AskedNumber(
            tensor, is_fresh=lambda: not written_after(last, node), unknown=unknown
        )
        if self._recorder.lies_in_state(tensor):  # perhaps a counter that is written to next
            number.settle()
        return number

    def finish(self) -> None:
        """Declare the end of the step.

        Raises
        ------
        OutcomeMismatchError
            When an earlier capture was asked for more.
        """
        if self._given is not None:
            self._given.finish()

    def look_ahead(self, reassigned: Mapping[str, torch.Tensor]) -> None:
        """Note the questions that the next step, after this forward, would answer otherwise.

        Parameters
        ----------
        reassigned
            By name, what forward puts in place of buffers and attributes.
        """
        if self._given is not None or not self._of_state:
            return
        after = {name: self._recorder.node_of(new) for name, new in reassigned.items()}
        for name, node in self.values.written_state().items():
            after.setdefault(name, node)
        for place, words in prepared(self.values, self._of_state, after).items():
            self.checks[place] = replace(self.checks[place], next_step=words)

    def answer(self, func: Any, args: tuple, kwargs: dict, error: Exception) -> Any:
        """Return the result of the call on the sample.

        Raises
        ------
        CaptureError
            When a plan for this answer would be useless.
        Exception
            ``error``, when there is no answer.
        """
        recorder = self._recorder
        node_args, node_kwargs = recorder.as_nodes(args), recorder.as_nodes(kwargs)
        _, source = recorder.origin()
        backward = recorder.phase == "backward"
        if has_lengths_in_lists(func):
            raise CaptureError(LENGTHS_IN_LISTS) from error
        if backward and not _of_forward(deciding(func, node_args, node_kwargs)):
            raise AskedInBackwardError(
                f"a backward hook or a custom autograd.Function asks for the value of a gradient "
                f"({calling_line()}), which is known only when the step runs. Keep the tensor: "
                "scale with torch.clamp(limit / g.norm(), max=1), choose with torch.where. To "
                "look at it, put the hook on a parameter or on the module that the plan is applied "
                "to, where it runs in each step, or look at the gradients after loss.backward()"
            ) from error
        if self._given is not None:
            outcome = self._given.of_call(func, source)
        else:
            try:
                result = self.values.compute(func, node_args, node_kwargs)
            except UnknowableError:
                raise error from None
            origins = self.values.follows_from(deciding(func, node_args, node_kwargs))
            if not _fills_least_length(func, node_args, node_kwargs, result):
                self._refuse_useless(result, origins, func, source)
            outcome = Outcome.of(result)
        self.outcomes.append(outcome)
        if outcome.made is None:
            with self._in_forward():
                self._expect_number(func, node_args, node_kwargs, outcome.number)
            self._look_at_chance(func, node_args, node_kwargs, outcome)
            return outcome.number
        out = made_like(outcome, func, args)
        recorder.record(func, args, kwargs, out)
        if backward:
            self._expect_masks(func, node_args, outcome, error)
            return out
        made = next(iter(tree_iter(out)))  # it settles the sizes of the other results
        self._check(checks.expect_shape, (recorder.node_of(made), list(made.shape)), _words(func))
        return out

    @contextmanager
    def _in_forward(self) -> Iterator[None]:
        """Put a check of what backward asks for at the end of forward.

        There the step can still be abandoned, and nothing writes to what autograd saves.
        """
        recorder = self._recorder
        if recorder.phase != "backward":
            yield
            return
        tangents = recorder.graph.find_nodes(op="placeholder")
        first = next(n for n in tangents if n.meta["role"] == "tangent")
        recorder.phase = "forward"
        try:
            with recorder.graph.inserting_before(first):
                yield
        finally:
            recorder.phase = "backward"

    def _expect_masks(self, func: Any, args: Any, outcome: Outcome, error: Exception) -> None:
        """Check in forward that masks pick as many elements as backward is planned for."""
        assert outcome.made is not None
        asked = deciding(func, args, {})
        masks = [n for n in tree_iter(asked) if isinstance(n, Node)]
        if func not in (aten.index.Tensor, aten.masked_select.default) or len(masks) != 1:
            raise error
        (mask,) = masks
        with self._in_forward():
            value = mask.meta["val"]
            num_picked = outcome.made[0].shape[_first_picked(args)]
            places = value.new_empty((num_picked, value.dim()), dtype=torch.long)
            node = self._recorder.call(aten.nonzero.default, (mask,), {})
            self._recorder.bind(node, places)
            self._check(checks.expect_shape, (node, list(places.shape)), _words(func))

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """All values of a stand-in, checked as a whole; ``None`` if they are not known."""
        recorder = self._recorder
        if recorder.phase == "backward":
            return None
        node = recorder.node_of(tensor)
        _, source = recorder.origin()
        if self._given is not None:
            value = read_like(self._given.of_reading(tensor, source), tensor)
        else:
            try:
                value = self.values.value(node)
            except UnknowableError:
                return None
            self._refuse_useless(value, self.values.follows_from(node), "reading", source)
        self.outcomes.append(Outcome.read(value))
        with disable_current_modes():  # making a stand-in is not a call of the step
            planned = recorder.node_of(value)
        self._check(checks.expect_values, (node, planned), "the values of a tensor")
        self._look_at_chance(None, (node,), {}, self.outcomes[-1])
        with disable_current_modes():
            return value.clone()  # nobody else may hold the planned one

    def _expect_number(self, func: Any, args: tuple, kwargs: dict, number: Any) -> None:
        what = _words(func)
        if func is local_scalar_dense.default:
            self._check(checks.expect_number, (args[0], number), what)
        elif func is aten.equal.default:
            self._check(checks.expect_equal, (args[0], args[1], number), what)
        elif func is aten.allclose.default:
            value = args[0].meta["val"]
            close = self._recorder.call(aten.isclose.default, args, kwargs)
            self._recorder.bind(close, value.new_empty(value.shape, dtype=torch.bool))
            same = self._recorder.call(aten.all.default, (close,), {})
            self._recorder.bind(same, value.new_empty((), dtype=torch.bool))
            self._check(checks.expect_number, (same, number), what)
        else:
            raise CaptureError(
                f"{func} asks for a value in a way that a plan cannot check; ask with .item()"
            )

    def _look_at_chance(self, func: Any, args: tuple, kwargs: Any, outcome: Outcome) -> None:
        """Look whether another step may find another value at the check made last."""
        origins = self.values.follows_from(args, kwargs)
        question = Asked(
            func=func,
            args=args,
            kwargs=kwargs,
            part=origins.part,
            outcome=outcome,
            place=len(self.checks) - 1,
        )
        if origins.state is not None:
            self._of_state.append(question)
        if origins.is_drawn and not any(check.next_step for check in self.checks):
            words = by_chance(self.values, question)
            self.checks[-1] = replace(self.checks[-1], next_step=words)

    def _check(self, target: Any, args: tuple, what: str) -> None:
        node = self._recorder.call(target, (*args, len(self.checks)), {})
        node.meta["val"] = None
        self.checks.append(
            Check(
                what=what,
                source=node.meta["source"],
                module_path=node.meta["module_path"],
                state=self.values.follows_from(args).state,
            )
        )

    def _refuse_useless(self, result: Any, origins: Origins, func: Any, source: str) -> None:
        """Refuse an answer whose plan would hold only for the step that it was made on."""
        if isinstance(result, bool) or (
            isinstance(result, torch.Tensor) and result.dtype == torch.bool and func == "reading"
        ):
            return
        is_shape = not isinstance(result, (int, float, complex)) and func != "reading"
        counted = origins.counted
        if counted is not None and not is_shape:
            raise CaptureError(
                f"forward reads a number out of buffer {counted!r}, which it changes in each step "
                f"({source}): a plan would hold for one step. Compute with the tensor itself; for "
                "batch normalization, give momentum a number instead of None"
            )
        if not origins.is_activation:
            return
        if is_shape:
            raise CaptureError(
                f"a shape depends on values that the model computes or draws ({_words(func)}, "
                f"{source}), so that each step has other sizes. Keep the sizes (torch.where, "
                "multiplying by the mask), or plan the blocks around this one, each by itself"
            )
        if not isinstance(result, int):
            raise CaptureError(
                f"forward reads numbers out of an activation ({source}), which each step has "
                "others of. Keep the tensor: to decide a branch compare it (if x > 0, not "
                "float(x) > 0; torch.isfinite(x), not math.isfinite(x)), to choose values take "
                "torch.where, to log them return them (x or x.item()) and read them in the "
                "training loop. For what must leave PyTorch, such as a matching, plan the part of "
                "the model before it"
            )


def _of_forward(tree: Any) -> bool:
    """Whether all nodes exist when forward ends."""
    return all(
        n.meta.get("phase", "forward") == "forward" and n.meta.get("role") != "tangent"
        for n in tree_iter(tree)
        if isinstance(n, Node)
    )


def _first_picked(args: Any) -> int:
    """The dimension of ``x[:, mask]`` that the mask makes."""
    indices = args[1]
    if isinstance(indices, Node):
        return 0
    return next(i for i, index in enumerate(indices) if index is not None)


def _fills_least_length(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether ``bincount(x, minlength=n)`` makes n counts, as for all x below n."""
    if func is not aten.bincount.default:
        return False
    least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
    return bool(result.numel() == least)


def _words(func: Any) -> str:
    name = str(func)
    if func is local_scalar_dense.default:
        return "a tensor's value"
    if func in (aten.equal.default, aten.allclose.default):
        return "whether two tensors are equal"
    return f"the sizes that {name.removesuffix('.default').removesuffix('.Tensor')} makes"


__all__ = ["Questions"]
