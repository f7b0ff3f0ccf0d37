"""Random generators in generated code: read, rewound for a repeated draw, and restored.

A repeated draw runs on the state that the first one found. Between the two
settings an error may come from the kernel, or Ctrl-C at any moment; generated
code has no ``finally``. So each rewinding is noted before it is done, and
:class:`PutRightOnError` undoes what is noted when an error passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import numpy as np
import torch

from graph_capture.calls.storage_id import bytes_in
from graph_capture.private_torch.autograd import set_grad_enabled


class _Rewound(threading.local):
    """What undoes this thread's open rewindings, the innermost last."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], object]] = []


_REWOUND = _Rewound()


class PutRightOnError:
    """When an error leaves it, generators and grad mode are restored as if the draw had not
    begun."""

    __slots__ = ("_depth", "_grad_enabled")

    def __enter__(self) -> None:
        self._depth = len(_REWOUND.undo)
        self._grad_enabled = torch.is_grad_enabled()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        set_grad_enabled(self._grad_enabled)
        while len(_REWOUND.undo) > self._depth:
            _REWOUND.undo[-1]()
            _REWOUND.undo.pop()


def read_cpu_generator() -> torch.Tensor:
    """Return the state of the default CPU generator, uint8[5056]."""
    return torch.get_rng_state()


def rewind_cpu_generator(state: torch.Tensor) -> np.ndarray:
    """Set the state of the default CPU generator; returns the previous one.

    The saved state, 5 kB, is in NumPy's memory: a tensor would occupy the device's
    memory, which is what is planned. To read it takes a tensor for a moment, which has
    the memory of the recorded state meanwhile.
    """
    memory = state.untyped_storage()
    recorded = np.empty(memory.nbytes(), dtype=np.uint8)
    torch.from_numpy(recorded).copy_(bytes_in(memory))
    try:
        memory.resize_(0)
        before = torch.get_rng_state().numpy().copy()
    finally:
        memory.resize_(recorded.nbytes)
        bytes_in(memory).copy_(torch.from_numpy(recorded))
    _REWOUND.undo.append(lambda: torch.set_rng_state(torch.from_numpy(before)))
    torch.set_rng_state(state)
    return before


def resume_cpu_generator(before: np.ndarray) -> None:
    """Resume from the state that :func:`rewind_cpu_generator` returned."""
    torch.set_rng_state(torch.from_numpy(before))
    _REWOUND.undo.pop()


def read_cuda_generator(device: torch.device) -> torch.Tensor:
    """Return the state of a device's default generator, uint8[16] in host memory."""
    return torch.cuda.get_rng_state(device)


def rewind_cuda_generator(state: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Set the state of a device's default generator; returns the previous one."""
    before = torch.cuda.get_rng_state(device)
    _REWOUND.undo.append(lambda: torch.cuda.set_rng_state(before, device))
    torch.cuda.set_rng_state(state, device)
    return before


def resume_cuda_generator(before: torch.Tensor, device: torch.device) -> None:
    """Go on from the state that :func:`rewind_cuda_generator` returned."""
    torch.cuda.set_rng_state(before, device)
    _REWOUND.undo.pop()


READS: dict[str, Callable] = {"cpu": read_cpu_generator, "cuda": read_cuda_generator}
REWINDS: dict[str, Callable] = {"cpu": rewind_cpu_generator, "cuda": rewind_cuda_generator}
RESUMES: dict[str, Callable] = {"cpu": resume_cpu_generator, "cuda": resume_cuda_generator}
