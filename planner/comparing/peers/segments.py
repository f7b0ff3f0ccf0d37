"""A peer that checkpoints about sqrt(L) segments of L blocks, in any model.

``checkpoint_sequential`` takes a list of functions of one argument. A model whose
forward calls its blocks one after another, with masks and other arguments, must be
rewritten by hand for it. Here the model's own forward runs, and its blocks behave
differently when they are called:

1. The model runs once without gradients, and each block's arguments are recorded:
   whether they are a block's output, an argument of the first block of its segment,
   or a constant.
2. In a training step, the first block of a segment runs the whole segment in one
   checkpoint, and the other blocks find their outputs there. Until then each of them
   returns a :class:`Promised`: a tensor without a value, which the model may pass to
   the next block and nowhere else.

A block's arguments are compared with the recorded ones in every step. A segment ends
where other code runs between two blocks, because that code cannot be repeated with them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graph_capture.private_torch.dispatch import without_torch_function_of_subclasses
from graph_capture.private_torch.trees import TreeSpec, tree_flatten, tree_unflatten

from ...base.preserve_state import preserve_state
from ...base.training_step import call_model
from .checkpointing import without_cache
from .peer import (
    Ready,
    Situation,
)

_Forward = Callable[..., Any]


@contextmanager
def sqrt_segments(model: nn.Module, situation: Situation) -> Iterator[Ready]:
    """Checkpoint all but the last of ``round(sqrt(L))`` segments.

    Raises
    ------
    ValueError
        When there are more chains of blocks that feed each other directly than there
        are to be segments, or when a block is called again.
    """
    yield _in_segments(model, situation)


def _in_segments(model: nn.Module, situation: Situation) -> Ready:
    """Install the segments; the recorded calls are freed when this returns."""
    names = situation.blocks()
    notes = [without_cache(model)]
    calls = record_calls(model, situation, names)
    chains = chains_of(calls)
    num_segments = max(1, round(math.sqrt(len(calls))))
    if len(chains) > num_segments:
        raise ValueError(
            f"{num_segments} segments of {len(calls)} blocks are wanted, but other code runs "
            f"between blocks in {len(chains) - 1} places (the first: {chains[0][-1].name} and "
            f"{chains[1][0].name}) and cannot be put into a segment with them"
        )
    if len(chains) > 1:
        notes.append(f"{len(chains)} stretches of blocks with other code between them")
    segments = divide([len(chain) for chain in chains], num_segments)
    flat = [call for chain in chains for call in chain]
    for segment in segments[:-1]:
        Segment([flat[i] for i in segment], flat[segment.stop :]).install(model)
    if len(segments) == 1:
        notes.append("one segment, which is kept: nothing is recomputed")
    return Ready(
        model=model, setting=f"segments={len(segments)}", note="; ".join(filter(None, notes))
    )


def divide(lengths: Sequence[int], num_segments: int) -> list[range]:
    """Cut chains of blocks into segments; a chain's last segment takes the remainder.

    With one chain these are the segments of ``checkpoint_sequential``.

    Examples
    --------
    >>> divide([8], 3)
    [range(0, 2), range(2, 4), range(4, 8)]
    >>> divide([4, 4], 3)
    [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    """
    segments, begin = [], 0
    for length in lengths:
        num = min(length, max(1, round(length * num_segments / sum(lengths))))
        starts = [begin + i * (length // num) for i in range(num)]
        begin += length
        segments += [range(a, b) for a, b in pairwise([*starts, begin])]
    return segments


# -- the blocks' arguments ------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A recorded call of a block: leaves of its arguments and of its output."""

    name: str
    arguments: list[Any]
    arguments_spec: TreeSpec
    outputs: list[Any]
    outputs_spec: TreeSpec


def record_calls(model: nn.Module, situation: Situation, names: Sequence[str]) -> list[Call]:
    """Run the model once without gradients and record the calls of its blocks.

    Raises
    ------
    ValueError
        When a block is called more than once.
    """
    calls: list[Call] = []

    def noting(name: str, forward: _Forward) -> _Forward:
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            arguments, arguments_spec = tree_flatten((args, kwargs))
            outputs, outputs_spec = tree_flatten(output)
            calls.append(
                Call(
                    name=name,
                    arguments=arguments,
                    arguments_spec=arguments_spec,
                    outputs=outputs,
                    outputs_spec=outputs_spec,
                )
            )
            return output

        return noted

    before = {name: model.get_submodule(name).__dict__.get("forward") for name in names}
    try:
        for name in names:
            block = model.get_submodule(name)
            block.forward = noting(name, block.forward)
        with preserve_state(model, situation.sample_input, None, None), torch.no_grad():
            call_model(model, situation.sample_input)
    finally:
        for name, forward in before.items():
            block = model.get_submodule(name)
            del block.forward
            if forward is not None:
                block.forward = forward
    if len({call.name for call in calls}) < len(calls):
        repeated = next(
            a.name for i, a in enumerate(calls) if a.name in {b.name for b in calls[:i]}
        )
        raise ValueError(f"block {repeated} is called more than once in a step: no segments")
    return calls


def chains_of(calls: Sequence[Call]) -> list[list[Call]]:
    """Runs of blocks that feed each other directly and need nothing else."""
    chains: list[list[Call]] = []
    for call in calls:
        if chains and _continues(chains[-1], call):
            chains[-1].append(call)
        else:
            chains.append([call])
    return chains


def _continues(chain: Sequence[Call], call: Call) -> bool:
    fed = any(a is b for a in call.arguments for b in chain[-1].outputs if isinstance(b, Tensor))
    # Any block of the chain may become the first of a segment.
    return fed and all(_sources(chain[i:], call) is not None for i in range(len(chain)))


def _sources(earlier: Sequence[Call], call: Call) -> list[tuple[int, int] | None] | None:
    """Where each argument comes from; ``None`` if one comes from elsewhere.

    A pair ``(k, i)`` is output ``i`` of the ``k``-th earlier call, ``(-1, i)`` is argument
    ``i`` of the first of them, and ``None`` is a constant.
    """
    found: list[tuple[int, int] | None] = []
    for value in call.arguments:
        if not _is_object(value):
            found.append(None)
            continue
        places = [
            (k, i) for k, e in enumerate(earlier) for i, o in enumerate(e.outputs) if o is value
        ]
        places += [(-1, i) for i, a in enumerate(earlier[0].arguments) if a is value]
        if not places:
            return None
        found.append(places[0])
    return found


def _is_object(value: Any) -> bool:
    """Whether a value is compared by identity."""
    constant = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
    return not isinstance(value, constant)


def _same(a: Any, b: Any) -> bool:
    if _is_object(a) or _is_object(b):
        return a is b
    return type(a) is type(b) and a == b


# -- a segment ------------------------------------------------------------------


class Promised(Tensor):
    """A tensor without a value; its shape, dtype and device may be read."""

    @staticmethod
    def of(value: Tensor) -> Promised:
        """A promise of a tensor; takes the memory of one element."""
        blank = torch.empty((), dtype=value.dtype, device=value.device)
        return blank.expand(value.shape).as_subclass(Promised)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer requests that need no value.

        Raises
        ------
        RuntimeError
            For any other request.
        """
        if func in _NEEDS_NO_VALUE:
            with without_torch_function_of_subclasses():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        asked = func.__self__.__name__ if name == "__get__" else name  # of an attribute
        raise RuntimeError(
            f"{asked} reads a value between two blocks of a segment, which does not exist: the "
            "segment runs under one checkpoint. Use checkpoint_per_block: these blocks cannot be "
            "grouped"
        )


_NEEDS_NO_VALUE = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")
    ),
}  # not requires_grad: the recorded run had no gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A block of a segment; holds no recorded tensor.

    Parameters
    ----------
    name
        Its path.
    arguments_spec, outputs_spec
        How its arguments and its output are nested.
    constants
        Arguments that are not tensors; ``None`` at the places of others.
    sources
        Where the others come from; see :func:`_sources`.
    promises
        What it returns in place of its outputs; ``None`` for outputs that are returned
        themselves, because they are not tensors or are read after the segment.
    """

    name: str
    arguments_spec: TreeSpec
    outputs_spec: TreeSpec
    constants: list[Any]
    sources: list[tuple[int, int] | None]
    promises: list[Promised | None]


class Segment:
    """Blocks that run under one checkpoint when the first of them is called.

    Parameters
    ----------
    calls
        The recorded calls of the segment's blocks.
    later
        The recorded calls of the blocks after it.
    """

    def __init__(self, calls: Sequence[Call], later: Sequence[Call]) -> None:
        self.members = [_member(calls, k, later) for k in range(len(calls))]
        self.forwards: list[_Forward] = []
        self.given: list[Any] = []
        self.made: list[list[Any]] = []

    def install(self, model: nn.Module) -> None:
        """Let the blocks of a model, the peer's own copy, run by the segment."""
        blocks = [model.get_submodule(member.name) for member in self.members]
        self.forwards = [block.forward for block in blocks]
        blocks[0].forward = self._first
        for k, block in enumerate(blocks[1:], start=1):
            block.forward = functools.partial(self._other, k)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        self.given, spec = tree_flatten((args, kwargs))
        self._check_spec(0, spec)
        kept = checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        self.made = [
            [
                v if promise is None else promise
                for v, promise in zip(values, m.promises, strict=True)
            ]
            for values, m in zip(kept, self.members, strict=True)
        ]
        return self._handed_out(0)

    def _run(self, *args: Any, **kwargs: Any) -> list[list[Any]]:
        """Run all blocks of the segment; return the outputs of each that are not promised."""
        given, _ = tree_flatten((args, kwargs))
        outputs: list[list[Any]] = []
        for k, forward in enumerate(self.forwards):
            if k:
                leaves = self._resolve(k, given, outputs)
                args, kwargs = tree_unflatten(leaves, self.members[k].arguments_spec)
                del leaves
            outputs.append(tree_flatten(forward(*args, **kwargs))[0])
        return [
            [v if promise is None else None for v, promise in zip(values, m.promises, strict=True)]
            for values, m in zip(outputs, self.members, strict=True)
        ]

    def _other(self, k: int, *args: Any, **kwargs: Any) -> Any:
        member = self.members[k]
        if not self.made:
            raise RuntimeError(f"block {member.name} was called before its segment began")
        leaves, spec = tree_flatten((args, kwargs))
        self._check_spec(k, spec)
        expected = self._resolve(k, self.given, self.made)
        for i, (value, wanted) in enumerate(zip(leaves, expected, strict=True)):
            if not _same(value, wanted):
                raise RuntimeError(
                    f"argument {i} of block {member.name} differs from the one when the calls "
                    "were recorded, so that the segment has computed something else"
                )
        return self._handed_out(k)

    def _resolve(self, k: int, given: list[Any], outputs: list[list[Any]]) -> list[Any]:
        member, leaves = self.members[k], []
        for source, constant in zip(member.sources, member.constants, strict=True):
            if source is None:
                leaves.append(constant)
            else:
                which, i = source
                leaves.append(given[i] if which < 0 else outputs[which][i])
        return leaves

    def _handed_out(self, k: int) -> Any:
        output = tree_unflatten(self.made[k], self.members[k].outputs_spec)
        if k == len(self.members) - 1:
            self.made, self.given = [], []
        return output

    def _check_spec(self, k: int, spec: TreeSpec) -> None:
        member = self.members[k]
        if spec != member.arguments_spec:
            raise RuntimeError(
                f"block {member.name} is called with {spec}, recorded was {member.arguments_spec}"
            )


def _member(calls: Sequence[Call], k: int, later: Sequence[Call]) -> Member:
    call = calls[k]
    sources: list[tuple[int, int] | None] | None = [None] * len(call.arguments)
    if k:
        sources = _sources(calls[:k], call)
    if sources is None:
        raise ValueError(f"block {call.name} needs what its segment's first block is not given")
    read = {id(a) for other in later for a in other.arguments}
    kept = k == len(calls) - 1  # the last block's output is the segment's output
    return Member(
        name=call.name,
        arguments_spec=call.arguments_spec,
        outputs_spec=call.outputs_spec,
        constants=[None if _is_object(a) else a for a in call.arguments],
        sources=sources,
        promises=[
            Promised.of(o) if isinstance(o, Tensor) and not (kept or id(o) in read) else None
            for o in call.outputs
        ],
    )
