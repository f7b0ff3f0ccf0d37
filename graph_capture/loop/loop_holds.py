"""What a training loop has in memory beside the step: outputs, older gradients, other tensors,
other calls of the model.

The words are a part of the question: they say what lives how long, so the cost graph is
assembled by them, and every search and every replay of it goes by them without knowing of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..cost_graph import MAX_TOTAL
from ..suggestions import did_you_mean
from ..units import format_bytes, parse_bytes
from .data_parallel import DataParallel
from .fully_sharded import FullySharded

Outputs = Literal["held", "released"]
Grads = Literal["none", "accumulated", "consumed"]

MAX_CONCURRENT_CALLS = 10_000


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopHolds:
    """What the loop around a step holds.

    Parameters
    ----------
    outputs
        ``"held"``: the model's outputs to the end of the step. ``"released"``: only until
        the loss exists. The loss is held in both. Where there is no loss, since the loop
        differentiates the outputs themselves, it holds them in any case.
    grads
        ``"none"``: no parameter has a gradient when forward begins. ``"accumulated"``:
        each that the step gives one has one, and it stays. ``"consumed"``: none has one,
        and each new one is gone as soon as it has arrived at its parameter, because an
        optimizer in a hook steps then.
    resident_bytes
        Bytes of other tensors of the caller on the device, all the while.
    concurrent_calls
        How many calls of the model are made before the first of them is differentiated.
    waiting_bytes
        What all of these but one hold for their backward passes, which a plan decides; 0
        before there is one.
    distributed
        The ``DistributedDataParallel`` around the model, whose buckets are counted.
    sharded
        How ``fully_shard`` shards the model's blocks and its root, where the step is one
        rank's.

    Raises
    ------
    ValueError
        When one is none of these, or two do not go together.

    Examples
    --------
    >>> LoopHolds(outputs="released").words
    ('outputs until the loss is there',)
    """

    outputs: Outputs = "held"
    grads: Grads = "none"
    resident_bytes: int = 0
    concurrent_calls: int = 1
    waiting_bytes: int = 0
    distributed: DataParallel | None = None
    sharded: FullySharded | None = None

    def __post_init__(self) -> None:
        for name, words in (("outputs", Outputs), ("grads", Grads)):
            value, known = getattr(self, name), get_args(words)
            if not isinstance(value, str) or value not in known:
                choices = " or ".join(map(repr, known))
                meant = did_you_mean(str(value), known)
                raise ValueError(f"{name} is {choices}, got {value!r:.100}; {meant}".rstrip("; "))
        for name in ("resident_bytes", "waiting_bytes"):
            num_bytes = getattr(self, name)
            if not _is_whole(num_bytes) or num_bytes < 0:
                raise ValueError(f"{name} is a number of bytes from 0 on, got {num_bytes!r}")
            if num_bytes > MAX_TOTAL:
                raise ValueError(f"{name} is at most {MAX_TOTAL} bytes, got {num_bytes}")
        calls = self.concurrent_calls
        if not _is_whole(calls) or not 1 <= calls <= MAX_CONCURRENT_CALLS:
            raise ValueError(
                "concurrent_calls is the number of calls before the first backward pass, from 1 "
                f"to {MAX_CONCURRENT_CALLS}, got {calls!r:.100}"
            )
        if self.waiting_bytes and calls == 1:
            raise ValueError("waiting_bytes are of other calls, and concurrent_calls is 1")
        if self.consumes and self.distributed is not None:
            raise ValueError(
                "grads='consumed' and distributed='ddp' do not go together: the buckets of "
                "DistributedDataParallel hold every gradient to the end of the backward pass, so "
                "that nothing is freed"
            )
        if self.sharded is not None and (self.distributed is not None or self.consumes):
            other = "grads='consumed'" if self.consumes else "DistributedDataParallel"
            raise ValueError(f"distributed={str(self.sharded)!r} and {other} do not go together")
        if self.sharded is not None and self.sharded.no_sync and not self.accumulates:
            raise ValueError(
                f"distributed={str(self.sharded)!r} adds up gradients of micro-batches: plan with "
                "grads='accumulated'"
            )
        if calls > 1 and (self.consumes or self.distributed is not None):
            word = "grads='consumed'" if self.consumes else "distributed='ddp'"
            raise ValueError(
                f"concurrent_calls={calls} and {word} do not go together yet: gradients arrive at "
                "their parameters when those of all calls are added up, which is not planned for"
            )

    @classmethod
    def of(
        cls,
        outputs: Any,
        grads: Any,
        resident_bytes: Any,
        concurrent_calls: Any = 1,
        distributed: Any = None,
    ) -> LoopHolds:
        """Read the words as users write them; ``resident_bytes`` may be ``"2GB"``, too.

        >>> LoopHolds.of("held", "none", "1MiB").resident_bytes
        1048576
        """
        if isinstance(resident_bytes, str):
            resident_bytes = _parsed(resident_bytes)
        return cls(
            outputs=outputs,
            grads=grads,
            resident_bytes=resident_bytes,
            concurrent_calls=concurrent_calls,
            **_around(distributed),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoopHolds:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, **_around(data.get("distributed"))})

    @property
    def around(self) -> DataParallel | FullySharded | None:
        """How several processes train the model, whichever way it is."""
        return self.sharded if self.distributed is None else self.distributed

    @property
    def releases(self) -> bool:
        """Whether outputs are let go of once the loss exists."""
        return self.outputs == "released"

    @property
    def accumulates(self) -> bool:
        """Whether gradients are there before the step."""
        return self.grads == "accumulated"

    @property
    def consumes(self) -> bool:
        """Whether a gradient is consumed as soon as it arrives at its parameter."""
        return self.grads == "consumed"

    @property
    def in_buckets(self) -> bool:
        """Whether gradients of parameters are parts of ``DistributedDataParallel``'s buckets.

        Those that micro-batches add up under ``no_sync()`` lie beside the buckets all the same.
        """
        views = self.distributed is not None and self.distributed.gradient_as_bucket_view
        return views and not self.accumulates

    @property
    def keeps_gradients(self) -> bool:
        """Whether memory for all gradients of parameters is there before the step."""
        return self.accumulates or self.in_buckets

    @property
    def copies_outputs(self) -> bool:
        """Whether the loop gets copies of the model's outputs."""
        return self.distributed is not None and self.distributed.copies_outputs

    @property
    def hands_on(self) -> bool:
        """Whether gradients of parameters leave a planned backward pass while it runs."""
        return self.accumulates or self.consumes or self.in_buckets

    @property
    def words(self) -> tuple[str, ...]:
        """What differs from a loop that holds its outputs and nothing else."""
        return (
            *(("outputs until the loss is there",) if self.releases else ()),
            *(("gradients of earlier backward passes",) if self.accumulates else ()),
            *(("each gradient until a hook has consumed it",) if self.consumes else ()),
            *(
                (f"{format_bytes(self.resident_bytes)} of the caller's own",)
                if self.resident_bytes
                else ()
            ),
            *(
                (f"{format_bytes(self.waiting_bytes)} of {_calls(self.concurrent_calls - 1)}",)
                if self.concurrent_calls > 1
                else ()
            ),
            *((f"buckets of {self.distributed}",) if self.distributed is not None else ()),
            *((f"one rank's part of {self.sharded}",) if self.sharded is not None else ()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what a plan file says; other calls only where there are some."""
        held = asdict(self)
        if self.concurrent_calls == 1:
            del held["concurrent_calls"], held["waiting_bytes"]
        del held["distributed"], held["sharded"]
        if self.around is not None:
            held["distributed"] = str(self.around)
        return held


NOTHING_ELSE = LoopHolds()
"""The loop that holds its outputs to the end of the step, and nothing beside it."""


def _around(word: Any) -> dict[str, Any]:
    """What a word for several processes says, by the field that it is for."""
    if FullySharded.is_word(word):
        return {"distributed": None, "sharded": FullySharded.of(word)}
    return {"distributed": DataParallel.of(word), "sharded": None}


def _calls(number: int) -> str:
    return "another call" if number == 1 else f"{number} other calls"


def _parsed(text: str) -> int:
    if text.strip() == "0":
        return 0
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(
            f"resident_bytes={text!r}: {error}; write resident_bytes='2GB' or a number of bytes"
        ) from error
