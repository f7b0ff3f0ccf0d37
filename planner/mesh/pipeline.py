"""The stages of a model that says which of its modules come before, in and after its layers.

Transformers' configurations say it (``base_model_pp_plan``): what comes before the layers is the
first stage's, what comes after them is the last one's, and the layers are divided. A later
stage gets the hidden states as ``inputs_embeds``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solvers.pipeline import even_ranges

INPUTS = ("input_ids", "inputs_embeds")
TARGETS = ("labels",)


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """One stage.

    Parameters
    ----------
    module
        What it runs.
    prefix
        What its paths lack of the whole model's.
    layers
        Which layers it has.
    """

    module: nn.Module
    prefix: str
    layers: range


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers have no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        with torch.no_grad():
            empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def sample_on_meta(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample without memory."""
    return {
        name: torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
        for name, value in sample.items()
    }


def num_layers(model: nn.Module) -> int:
    """Return how many layers a model has that can be divided into stages.

    Raises
    ------
    ValueError
        When it does not say which modules these are.
    """
    base, _, at = _plan_of(model)
    return len(base.get_submodule(at))  # type: ignore[arg-type]


def stage_of(model: nn.Module, stage: int, num_stages: int) -> StageModel:
    """Return a stage of a model on ``meta``; the model itself is left as it is.

    Parameters
    ----------
    model
        A model of Transformers with a pipeline plan.
    """
    if num_stages == 1:
        return StageModel(module=copy.deepcopy(model), prefix="", layers=range(0))
    _, names, at = _plan_of(model)
    if num_layers(model) < num_stages:
        raise ValueError(f"{num_layers(model)} layers cannot make {num_stages} stages: lower pp")
    layers = range(*even_ranges(num_layers(model), num_stages)[stage])
    own = copy.deepcopy(model)
    base, _, _ = _plan_of(own)
    middle = names.index(at)
    gone = [] if stage == 0 else names[:middle]
    if stage < num_stages - 1:
        gone = [*gone, *names[middle + 1 :]]
    for name in gone:
        setattr(base, name, nn.Identity())
    all_layers = base.get_submodule(at)
    setattr(base, at, nn.ModuleList(all_layers[i] for i in layers))  # type: ignore[index]
    if stage == num_stages - 1:
        return StageModel(module=own, prefix="", layers=layers)
    prefix = next(path for path, module in own.named_modules() if module is base)
    return StageModel(module=base, prefix=f"{prefix}.", layers=layers)


def stage_sample(
    sample: Mapping[str, Any], hidden: Tensor | None, stage: int, num_stages: int
) -> dict[str, Any]:
    """Return a stage's arguments: targets for the last one, hidden states behind the first.

    Parameters
    ----------
    hidden
        What the stage before has returned.
    """
    own = dict(sample)
    if stage < num_stages - 1:
        own = {name: value for name, value in own.items() if name not in TARGETS}
    if hidden is not None:
        own = {name: value for name, value in own.items() if name not in INPUTS}
        own["inputs_embeds"] = hidden
    return own


def _plan_of(model: nn.Module) -> tuple[nn.Module, list[str], str]:
    """Return the module with the layers, the modules that it names, and the layers' name."""
    plan = getattr(getattr(model, "config", None), "base_model_pp_plan", None)
    base = getattr(model, "base_model", None)
    if plan and isinstance(base, nn.Module) and base is not model:
        names = list(plan)
        lists = [name for name in names if isinstance(getattr(base, name, None), nn.ModuleList)]
        if len(lists) == 1:
            return base, names, lists[0]
    raise ValueError(
        f"{type(model).__name__} does not say which of its modules are the layers of a pipeline "
        "(Transformers' models have base_model_pp_plan in their configuration): plan each stage as "
        "a module of its own, by optimize(stage, …, grads='accumulated', concurrent_calls=…)"
    )
