"""Whether a module is noticed to be built otherwise than before."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn
from torch.nn.utils import parametrizations

from planner.base.module_structure import LiveStructure, Structure


def build() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def test_training_does_not_change_it():
    """New values, gradients, flags and dtypes leave the structure as it is."""
    model = build()
    structure = Structure.of(model)
    model(torch.ones(1, 4)).sum().backward()
    model.eval()
    model.double()
    assert structure.holds()


def test_a_replaced_module_changes_it():
    """An equal module in another's place is another module."""
    model = build()
    structure = Structure.of(model)
    model[1] = nn.Tanh()
    assert not structure.holds()


def test_an_added_module_changes_it():
    """A module more, and a parametrization, which is one."""
    for add in (
        lambda model: model.append(nn.Tanh()),
        lambda model: parametrizations.weight_norm(model[0]),
    ):
        model = build()
        structure = Structure.of(model)
        add(model)
        assert not structure.holds()


def test_a_cut_tie_changes_it():
    """Two weights that were one."""
    model = build()
    structure = Structure.of(model)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    assert not structure.holds()


def test_a_tie_that_stays_does_not():
    """A tied weight that is replaced in both places is still tied."""
    model = build()
    structure = Structure.of(model)
    model[0].weight = model[2].weight = nn.Parameter(torch.zeros(4, 4))
    assert structure.holds()


def test_a_table_in_the_place_of_another_is_a_difference():
    """Here ``nn.Sequential`` makes one, with equal contents, and takes modules from it later."""
    model = build()
    live, table = LiveStructure(model), model._modules
    model.insert(1, nn.Tanh())
    del model[1]
    assert model._modules is not table
    assert live.difference() is not None


def test_parameters_in_another_table_are_a_difference():
    """They are compared as objects: tensors are no truth values."""
    model = build()
    live = LiveStructure(model)
    model[0]._parameters = {name: nn.Parameter(p + 1) for name, p in model[0].named_parameters()}
    assert live.difference() is not None


def test_it_keeps_nothing_alive():
    """A model that is gone is gone, and its structure no longer holds."""
    model = build()
    structure, gone = Structure.of(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not structure.holds()
