"""What ``fully_shard`` (FSDP2) around a model's blocks has in memory, on the fullest rank.

Each parameter is cut along its first dimension into as many shards as there are ranks, each
as long as the first one, which none is longer than. A *group* is what is gathered together:
the parameters of a block, or all others, which are the root's. To gather a group, a buffer
receives the shards of all ranks, and the parameters are copied out of it. To reduce a group's
gradients, they are copied into a buffer of padded shards, from which a second one is made: the
sum of this rank's shards, of which the sharded gradients are parts.

On the CPU, where gloo communicates, both collectives have a copy of the larger buffer for a while;
what communication libraries take on other devices is their own and not known here.

Source: ``torch/distributed/fsdp/_fully_shard`` (``_fsdp_collectives.py``: ``foreach_all_gather``,
``foreach_all_gather_copy_out``, ``foreach_reduce``; ``_fsdp_param.py``: ``_init_sharded_param``),
``torch/csrc/distributed/c10d/ProcessGroupGloo.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ..calls.call_spec import parse_dtype
from ..costs.allocator import block_bytes
from ..private_torch.sharding import gathered_group_of

WORD = "fsdp2"
_FLAGS = ("reshard_root", "no_sync")
_DIVISOR_BYTES = 8  # on the CPU the number of ranks is a tensor, as a double and in the dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class FullySharded:
    """How a model's blocks and its root are sharded, as far as memory depends on it.

    Parameters
    ----------
    ranks
        Among how many processes parameters are sharded.
    reshard_after_forward
        As ``fully_shard`` takes it for the blocks: ``True`` frees gathered parameters after
        forward, ``False`` keeps them until backward, a number keeps shards among so many
        ranks.
    reshard_root
        Whether the root's own parameters are resharded after forward, too: ``fully_shard`` does
        not, unless told to.
    no_sync
        Whether micro-batches add up unsharded gradients
        (``set_requires_gradient_sync(False)``) until the last one reduces them.
    stored
        Dtype of the shards, where a mixed-precision policy gathers parameters in another: the
        one of the planned model. Empty for the same.
    reduce_dtype
        Of that policy; empty for the dtype of the gradients.

    Examples
    --------
    >>> print(FullySharded.of("fsdp2:ranks=2, reshard_after_forward=False"))
    fsdp2:ranks=2,reshard_after_forward=False
    """

    ranks: int
    reshard_after_forward: bool | int = True
    reshard_root: bool = False
    no_sync: bool = False
    stored: str = ""
    reduce_dtype: str = ""

    def __post_init__(self) -> None:
        if not _is_number(self.ranks) or not 2 <= self.ranks < 2**31:
            raise ValueError(f"{WORD} shards among two ranks or more, got ranks={self.ranks!r:.50}")
        to = self.reshard_after_forward
        if not isinstance(to, bool) and not (
            _is_number(to) and 1 < to < self.ranks and self.ranks % to == 0
        ):
            raise ValueError(
                f"reshard_after_forward is True, False, or a divisor of ranks={self.ranks} between "
                f"1 and it, got {to!r:.50}"
            )
        for name in ("stored", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype and not parse_dtype(dtype).is_floating_point:
                raise ValueError(f"{name} is a dtype such as float32, got {dtype!r:.50}")

    @classmethod
    def is_word(cls, word: Any) -> bool:
        """Whether a word is meant to say how a model is sharded."""
        return isinstance(word, cls) or (
            isinstance(word, str) and word.strip().partition(":")[0] in (WORD, "fsdp")
        )

    @classmethod
    def of(cls, word: Any) -> FullySharded:
        """Read ``"fsdp2:ranks=2"``, and other options after it with commas between them.

        Raises
        ------
        ValueError
            When it is something else.
        """
        if isinstance(word, cls):
            return word
        known = [f.name for f in fields(cls)]
        kind, _, options = word.partition(":") if isinstance(word, str) else ("", "", "")
        said = [part.partition("=") for part in options.split(",") if part.strip()]
        given = {name.strip(): value.strip() for name, _, value in said}
        wrong = set(given) - set(known) or len(given) != len(said)
        if kind.strip() != WORD or wrong or "ranks" not in given:
            raise ValueError(
                f"distributed for fully_shard is '{WORD}:ranks=2', and after it some of "
                f"{', '.join(known[1:])} with commas between them, got {word!r:.100}"
            )
        return cls(**{name: _read(name, value) for name, value in given.items()})

    @classmethod
    def found_on(cls, block: nn.Module) -> FullySharded | None:
        """Return how a block is sharded; ``None`` where it is not, or among one rank.

        Of ``reshard_root`` a block shows nothing.
        """
        group = gathered_group_of(block)
        ranks = 1 if group is None else group.mesh_info.shard_mesh_size
        if ranks < 2:
            return None
        after, policy = group.post_forward_mesh_info, group.mp_policy
        reshard = after is not None and (after.shard_mesh_size == ranks or after.shard_mesh_size)
        stored = next(iter(group.fsdp_params)).sharded_param.dtype
        gathered, reduced = policy.param_dtype or stored, policy.reduce_dtype
        return cls(
            ranks=ranks,
            reshard_after_forward=reshard,
            no_sync=not group.reduce_grads,
            stored="" if gathered == stored else _name(stored),
            reduce_dtype="" if reduced in (None, gathered) else _name(reduced),
        )

    def without_dtype(self, dtype: torch.dtype) -> FullySharded:
        """Return the same without saying of a dtype that it is this one, in which blocks run."""
        name = _name(dtype)
        stored = "" if self.stored == name else self.stored
        reduced = "" if self.reduce_dtype == name else self.reduce_dtype
        return replace(self, stored=stored, reduce_dtype=reduced)

    def __str__(self) -> str:
        chosen = [f"ranks={self.ranks}"]
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if value != f.default:
                chosen.append(f.name if f.name in _FLAGS else f"{f.name}={value}")
        return f"{WORD}:{','.join(chosen)}"

    def shard_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a stand-in without data for the first rank's shard of a parameter.

        Raises
        ------
        ValueError
            When ``fully_shard`` cannot shard it.
        """
        shape = self._padded(parameter)
        return torch.empty(
            (shape[0] // self.ranks, *shape[1:]), dtype=self._stored(parameter), device="meta"
        )

    def _stored(self, tensor: torch.Tensor) -> torch.dtype:
        return parse_dtype(self.stored) if self.stored else tensor.dtype

    def _padded(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """A tensor's shape with a first dimension that the ranks divide evenly."""
        if not tensor.ndim:
            raise ValueError("fully_shard cannot shard parameters without dimensions")
        return -(-tensor.shape[0] // self.ranks) * self.ranks, *tensor.shape[1:]

    def shard_bytes(self, parameter: torch.Tensor) -> int:
        """Return the bytes of a parameter's shard."""
        return self.padded_elements(parameter) // self.ranks * self._stored(parameter).itemsize

    def padded_elements(self, tensor: torch.Tensor) -> int:
        """Return the number of elements of a parameter, or of its gradient, with its padding."""
        return math.prod(self._padded(tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBytes:
    """What gathering and reducing a group's parameters takes on one rank, in bytes.

    Parameters
    ----------
    buffer
        That receives the shards of all ranks.
    gathered
        The parameters, copied out of it.
    gathering
        While it is filled: shards in the dtype that is gathered, copies that gloo has.
    kept
        Of each gathered parameter that stays after forward; 0 where none or all does.
    reduced
        The buffer of all gradients.
    result
        The sum of this rank's shards in the dtype that is reduced.
    gradients
        The sharded gradients; they lie in ``result`` where the dtype is the same.
    reducing
        While the sum is made: copies that gloo has.
    unsharded
        Gradients of all micro-batches so far that are not yet reduced.
    """

    buffer: int
    gathered: int
    gathering: int
    kept: int
    reduced: int
    result: int
    gradients: int
    reducing: int
    unsharded: int

    @classmethod
    def of(
        cls,
        options: FullySharded,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        torch_type: str,
    ) -> GroupBytes:
        """Count a group's bytes.

        Parameters
        ----------
        parameters
            Of the planned model, in the dtype in which they are gathered, each once.
        gradients
            Those that the step gives its parameters, likewise.
        torch_type
            ``"cpu"`` or ``"cuda"``.
        """
        ranks, library = options.ranks, torch_type == "cpu"
        elements = [options.padded_elements(p) for p in parameters]
        whole = [n * p.element_size() for n, p in zip(elements, parameters, strict=True)]
        casts = [
            b // ranks
            for b, p in zip(whole, parameters, strict=True)
            if options._stored(p) != p.dtype
        ]
        to = options.reshard_after_forward
        kept = [b // to for b in whole] if not isinstance(to, bool) else []
        sums = [options.padded_elements(g) for g in gradients]
        reduce_sizes = [
            parse_dtype(options.reduce_dtype).itemsize if options.reduce_dtype else g.element_size()
            for g in gradients
        ]
        reduced = _dot(sums, reduce_sizes)
        divisor = _DIVISOR_BYTES + max(reduce_sizes, default=0)

        def blocks(sizes: Iterable[int]) -> int:
            return sum(block_bytes(size, torch_type) for size in sizes)

        return cls(
            buffer=blocks([sum(whole)]),
            gathered=blocks(whole),
            gathering=blocks([sum(casts)]) + (sum(whole) if library else 0),
            kept=blocks(kept),
            reduced=blocks([reduced]),
            result=blocks([reduced // ranks]),
            gradients=blocks(
                [_dot([n // ranks for n in sums], [options._stored(g).itemsize for g in gradients])]
            ),
            reducing=reduced + divisor if library and gradients else 0,
            unsharded=blocks(
                g.numel() * size for g, size in zip(gradients, reduce_sizes, strict=True)
            ),
        )


def _read(name: str, value: str) -> Any:
    if name in _FLAGS:
        if value:
            raise ValueError(f"{name} takes no value, got {value!r:.50}")
        return True
    if value.lower() in ("true", "false") and name == "reshard_after_forward":
        return value.lower() == "true"
    if name in ("ranks", "reshard_after_forward"):
        return int(value) if value.isascii() and value.isdigit() else value
    return _name(parse_dtype(value))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dot(numbers: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(n * size for n, size in zip(numbers, sizes, strict=True))


__all__ = ["FullySharded", "GroupBytes"]
