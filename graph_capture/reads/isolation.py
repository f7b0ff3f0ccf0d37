"""Run a model's forward on stand-ins without leaving a trace.

A forward may cache tensors on its modules, append to lists, count steps and
draw random numbers. While a model is captured its parameters are stand-ins, so
anything that it leaves behind would corrupt later training. Everything that a
module holds in its ``__dict__`` is restored, including the contents of lists, dicts
and sets at any depth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..private_torch.modules import buffers_of, parameters_of
from .ledger import Ledger


@contextmanager
def undisturbed(model: nn.Module, others: Iterable[Any] = ()) -> Iterator[None]:
    """Restore the modules, the random generators and autocast's cache afterwards.

    The attributes of ``others``, objects that forward is called with, are restored, too.
    """
    torch.clear_autocast_cache()
    with generators_put_back(), attributes_put_back((*model.modules(), *others)):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Restore the global random generators of Python, NumPy and PyTorch afterwards.

    If CUDA is in use, the generators of all CUDA devices are included, because
    ``torch.manual_seed`` seeds them.
    """
    states = generator_states()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        set_generator_states(states)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def generator_states() -> tuple[np.ndarray, ...]:
    """Return the states of PyTorch's generators: the CPU's and, if CUDA is in use, each device's.

    The states are NumPy arrays. Tensors (5 kB on the CPU) would count beside a step that is
    captured again in the middle of training.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return tuple(state.numpy().copy() for state in (torch.get_rng_state(), *cuda))


def set_generator_states(states: tuple[np.ndarray, ...]) -> None:
    """Set what :func:`generator_states` returned."""
    torch.set_rng_state(torch.from_numpy(states[0]))
    if len(states) > 1:
        torch.cuda.set_rng_state_all([torch.from_numpy(state) for state in states[1:]])


@contextmanager
def attributes_put_back(holders: Iterable[Any]) -> Iterator[None]:
    """Restore the objects' attributes afterwards.

    This includes the contents of lists, dicts and sets at any depth, but not of tensors
    and other objects. What did not change is not written to.
    """
    ledger = Ledger()
    for holder in holders:
        ledger.attributes(holder)
    try:
        yield
    finally:
        ledger.put_back()


def swap_tensors(model: nn.Module, stand_in: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace every tensor of a module by a stand-in (undone by ``undisturbed``).

    Uses ``setattr``, so that modules that keep second references notice, as ``nn.LSTM``
    does in ``_flat_weights``.
    """
    for module in list(model.modules()):
        for name, parameter in list(parameters_of(module).items()):
            if parameter is not None:
                setattr(module, name, stand_in(parameter))
        for name, buffer in list(buffers_of(module).items()):
            if buffer is not None:
                setattr(module, name, stand_in(buffer))
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                vars(module)[name] = stand_in(value)
