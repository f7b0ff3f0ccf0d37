"""What ``DistributedDataParallel`` around a model has in memory.

Its reducer has *buckets*: flat tensors, as many bytes as the gradients of all trainable
parameters together, from the wrapper's construction on. A gradient that arrives is
written to its bucket, and the bucket is reduced. With ``gradient_as_bucket_view=True`` the
gradient then is that part of the bucket; else it stays beside it, as it does under ``no_sync()``,
where nothing is written to buckets. So that unused parameters
are found, the wrapper copies all outputs in each step, under ``static_graph=True`` in the first.

Source: torch/csrc/distributed/c10d/reducer.cpp (``initialize_buckets``,
``mark_variable_ready_dense``, ``initialize_local_used_map``) and ``_DDPSink`` in
torch/nn/parallel/distributed.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..private_torch.modules import bucketed_parameters_of, replicated_by

WORD = "ddp"
_FLAG_BYTES = 4  # an int32 for each parameter that says whether it was used


@dataclass(frozen=True, slots=True, kw_only=True)
class DataParallel:
    """The options of ``DistributedDataParallel`` that change what is in memory.

    Parameters
    ----------
    gradient_as_bucket_view, find_unused_parameters, static_graph
        As ``DistributedDataParallel`` has them.

    Examples
    --------
    >>> print(DataParallel.of("ddp:gradient_as_bucket_view"))
    ddp:gradient_as_bucket_view
    """

    gradient_as_bucket_view: bool = False
    find_unused_parameters: bool = False
    static_graph: bool = False

    @classmethod
    def of(cls, word: Any) -> DataParallel | None:
        """Read ``"ddp"``, or ``"ddp:"`` and options with commas between them.

        Raises
        ------
        ValueError
            When it is something else.
        """
        if word is None or isinstance(word, cls):
            return word
        known = [f.name for f in fields(cls)]
        kind, _, options = word.partition(":") if isinstance(word, str) else ("", "", "")
        chosen = [part.strip() for part in options.split(",") if part.strip()]
        if kind != WORD or not set(chosen) <= set(known):
            raise ValueError(
                f"distributed is None, 'ddp', or 'ddp:' and some of {', '.join(known)} with "
                f"commas between them, or for plans in blocks 'fsdp2:ranks=2'; got {word!r:.100}"
            )
        return cls(**dict.fromkeys(chosen, True))

    @classmethod
    def of_wrapper(cls, wrapper: DistributedDataParallel) -> DataParallel:
        """Read the options of a wrapper."""
        return cls(**{f.name: bool(getattr(wrapper, f.name)) for f in fields(cls)})

    @classmethod
    def found_on(cls, model: Any) -> DataParallel | None:
        """Return the options of a wrapper or of ``replicate``; ``None`` without either."""
        if isinstance(model, DistributedDataParallel):
            return cls.of_wrapper(model)
        replicated = replicated_by(model)
        if replicated is None:
            return None
        wrapper, options = replicated
        if wrapper is not None:
            return cls.of_wrapper(wrapper)
        return cls(**{f.name: bool(options.get(f.name)) for f in fields(cls)})

    @property
    def copies_outputs(self) -> bool:
        """Whether the model's outputs are copied, in the first step at least."""
        return self.find_unused_parameters or self.static_graph

    def __str__(self) -> str:
        chosen = ",".join(f.name for f in fields(self) if getattr(self, f.name))
        return f"{WORD}:{chosen}" if chosen else WORD


def bucket_bytes(options: DataParallel, parameters: Iterable[torch.Tensor], torch_type: str) -> int:
    """Return the bytes of a reducer's buckets, and of its flags for unused parameters.

    Parameters
    ----------
    parameters
        The wrapped module's, each once.
    torch_type
        ``"cpu"`` or ``"cuda"``; for a model on the CPU both copies of the flags lie there.
    """
    trainable = [p for p in parameters if p.requires_grad]
    num_flags = len(trainable) * (2 if torch_type == "cpu" else 1) if options.copies_outputs else 0
    return sum(p.numel() * p.element_size() for p in trainable) + num_flags * _FLAG_BYTES


def scaling_bytes(torch_type: str) -> int:
    """Return what the reducer takes for a moment to divide a gradient by the number of ranks.

    On the CPU the divisor is a tensor, once as a double and once as a float.
    """
    return 12 if torch_type == "cpu" else 0


def ranks_of(model: Any) -> Sequence[int] | None:
    """Return the processes among which a wrapper, or ``replicate``, reduces gradients."""
    if isinstance(model, DistributedDataParallel):
        return dist.get_process_group_ranks(model.process_group)
    replicated = replicated_by(model)
    if replicated is None:
        return None
    wrapper, options = replicated
    group, mesh = options.get("process_group"), options.get("device_mesh")
    if wrapper is not None:
        group = wrapper.process_group
    elif mesh is not None:
        group = mesh.get_group()
    return dist.get_process_group_ranks(group or dist.group.WORLD)


def buckets_of(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters whose gradients lie in a wrapper's buckets."""
    return [p for p in bucketed_parameters_of(wrapper) if p.requires_grad]


__all__ = ["DataParallel", "bucket_bytes", "buckets_of", "ranks_of", "scaling_bytes"]
