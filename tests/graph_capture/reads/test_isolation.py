"""Capturing leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

from graph_capture.reads.isolation import swap_tensors, undisturbed


class _Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.history: list[object] = [1, {"deep": {1, 2}}]
        self.register_buffer("steps", torch.zeros(()))


def test_attributes_and_contents_are_put_back() -> None:
    """New attributes go, lists, dicts and sets at any depth have their contents again."""
    model = _Keeper()
    history, weight = model.history, model.layer.weight
    with undisturbed(model):
        model.cache = torch.ones(3)
        model.history.append(2)
        model.history[1]["deep"].add(9)  # type: ignore[index]
        model.history = []
        model.layer.weight = nn.Parameter(torch.zeros(2, 2))
        model.steps = torch.ones(())
    assert not hasattr(model, "cache")
    assert model.history is history
    assert history == [1, {"deep": {1, 2}}]
    assert model.layer.weight is weight
    assert model.steps.item() == 0


def test_generators_are_put_back() -> None:
    """torch's, NumPy's and Python's generators go on as if nothing had been drawn."""
    expected = None
    for _ in range(2):
        with undisturbed(nn.Linear(1, 1)):
            drawn = torch.rand(()).item(), float(np.random.rand()), random.random()
        expected = expected or drawn
        assert drawn[1:] == expected[1:]
    state = torch.get_rng_state()
    with undisturbed(nn.Identity()):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_is_no_excuse() -> None:
    """Everything is put back when forward raises, too."""
    model = _Keeper()
    try:
        with undisturbed(model):
            model.history.clear()
            raise RuntimeError
    except RuntimeError:
        pass
    assert len(model.history) == 2


def test_second_references_are_swapped() -> None:
    """nn.LSTM's list of weights sees the stand-ins, and its own weights afterwards."""
    lstm = nn.LSTM(2, 2)
    before = list(lstm._flat_weights)
    with undisturbed(lstm):
        swap_tensors(lstm, lambda t: nn.Parameter(torch.zeros_like(t)))
        assert all(new is not old for new, old in zip(lstm._flat_weights, before, strict=True))
    assert all(new is old for new, old in zip(lstm._flat_weights, before, strict=True))


class _Frozen(dict):
    """Refuses every write."""

    def update(self, *_args: object, **_more: object) -> None:
        raise TypeError

    __setitem__ = clear = pop = update  # type: ignore[assignment]


def test_a_container_that_refuses_writes_is_left_alone_or_put_back() -> None:
    """Nothing is written where nothing changed, and what did change is put back all the same."""
    model = _Keeper()
    model.config = _Frozen(a=1, b=[1])  # type: ignore[assignment]
    with undisturbed(model):
        dict.update(model.config, a=2)  # type: ignore[arg-type]
        model.config["b"].append(2)  # type: ignore[index]
    assert model.config == {"a": 1, "b": [1]}


def test_slots_of_an_argument_are_put_back() -> None:
    """An object that keeps its attributes in slots."""

    class Options:
        __slots__ = ("count",)

        def __init__(self) -> None:
            self.count = 1

    options = Options()
    with undisturbed(_Keeper(), [options]):
        options.count = 2
    assert options.count == 1
