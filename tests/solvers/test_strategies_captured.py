"""Strategies on steps of real models, and beside what PyTorch runs when told to checkpoint."""

from __future__ import annotations

import contextlib
import copy
import functools
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from benchmarks.testing.zoo import ZOO
from graph_capture import capture
from graph_capture.cost_graph import CostGraph
from graph_capture.recording.recorder import Recorder
from graph_capture.tracing import trace
from solvers.instances import budget_of
from solvers.replay import Replay, replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy, module_blocks
from solvers.strategies.policies import save_matmuls_per_block
from solvers.strategies.uniform_segments import every_n_layers, per_layer, uniform_segments

SOLVING = {
    "auto",
    "rotor",
    "rotor_menus",
    "checkmate_milp",
    "checkmate_lp_rounding",
    "moccasin",
    "uniform_bytes",
}
NO_CORE = {"megatron_selective": "no softmax between two batched matrix products"}
WHY_NOT: dict[str, dict[str, str]] = {"gpt2": {}, "bert": {}, "resnet50": NO_CORE, "unet": NO_CORE}
"""By model the strategies that do not apply, and what they say."""


@functools.cache
def captured(name: str) -> CostGraph:
    """The step of a model of the zoo."""
    case = ZOO[name]("tiny")
    return capture(case.make(), case.sample(0), loss_fn=case.loss_fn)


def checkpointed(model: nn.Module, sample: Any, loss_fn: Any = None) -> Replay:
    """The step with the model's own checkpoints, as PyTorch runs it, by the same judge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "checkpoints_inlined", contextlib.nullcontext)
        # A checkpoint puts the generator back in backward, which a plan could not follow.
        patch.setattr(Recorder, "check_generators", lambda self: None)
        graph = capture(model, sample, loss_fn=loss_fn)
    return replay(graph, Schedule.keep_all(graph))


@pytest.mark.parametrize("model", sorted(WHY_NOT))
def test_applies_or_says_why_not(model: str) -> None:
    """Each strategy gives a valid schedule that recomputes something, or its reason."""
    graph = captured(model)
    kept = replay(graph, Schedule.keep_all(graph))
    for name in sorted(set(STRATEGIES) - SOLVING):
        strategy = STRATEGIES[name]
        budget = budget_of(graph, 0.8) if strategy.needs_budget else None
        if name in WHY_NOT[model]:
            with pytest.raises(StrategyError, match=WHY_NOT[model][name]):
                apply_strategy(strategy, graph, budget_bytes=budget)
            continue
        outcome = apply_strategy(strategy, graph, budget_bytes=budget)
        assert outcome.fits, name
        saves = outcome.peak_bytes < kept.peak_bytes and outcome.cost_ns > kept.cost_ns
        assert saves or (name, outcome.setting) in {("none", ""), ("uniform_sqrt", "segments=1")}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("resnet50", [f"resnet.encoder.stages.{s}.layers.{b}" for s in (0, 1) for b in (0, 1)]),
        ("unet", ["down.0", "down.1", "down.2", "up.0", "merge.0", "up.1", "merge.1"]),
    ],
)
def test_blocks_are_what_the_model_calls_so(model: str, names: list[str]) -> None:
    """Layers of transformers, blocks of a ResNet's stages, levels of a U-Net."""
    assert [block.name for block in module_blocks(captured(model)).blocks] == names


@pytest.mark.parametrize(("model", "every"), [("bert", 1), ("llama", 1), ("vit", 1), ("bert", 2)])
def test_every_nth_layer_is_what_transformers_runs(model: str, every: int) -> None:
    """Peak and time are those of the step captured with its own checkpoints, to the byte.

    But for states of the generator, which a capture of ``checkpoint`` does not see.
    """
    case = ZOO[model]("tiny")
    module = case.make()
    module.config.use_cache = False  # type: ignore[union-attr]
    theirs = copy.deepcopy(module)
    enable = getattr(theirs, "activation_checkpointing_enable", None)  # its name since 5.x
    options = {} if every == 1 else {"every_n_layers": every}
    if options and (enable is None or "every_n_layers" not in signature(enable).parameters):
        pytest.skip("a Transformers without every_n_layers")
    (enable or theirs.gradient_checkpointing_enable)(**options)  # type: ignore[operator]
    sample = case.sample(0)
    graph = capture(module, sample, loss_fn=case.loss_fn)
    ours = replay(graph, per_layer(graph) if every == 1 else every_n_layers(graph, every))
    expected = checkpointed(theirs, sample, case.loss_fn)
    at_peak = (graph.storages[k] for k in ours.live_at(ours.peak_step))
    states_bytes = sum(s.size_bytes for s in at_peak if s.name.startswith("generator_state"))
    assert ours.peak_bytes - states_bytes == expected.peak_bytes
    assert ours.cost_ns == expected.cost_ns
    assert ours.peak_bytes < replay(graph, Schedule.keep_all(graph)).peak_bytes


class _Stack(nn.Module):
    """Nine blocks with dropout, run plainly, in three segments, or selectively checkpointed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64))
                for _ in range(9)
            )
        )
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sequential":
            x = checkpoint_sequential(self.layers, 3, x, use_reentrant=False)
        elif self.how == "selective":
            contexts = functools.partial(
                create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
            )
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
        else:
            x = self.layers(x)
        return self.head(x)


def _stack(how: str) -> tuple[nn.Module, Tensor]:
    return _Stack(how).train(), torch.zeros(128, 64, requires_grad=True)


def test_uniform_segments_are_what_checkpoint_sequential_runs() -> None:
    """Three segments of three blocks, the last one kept: the same peak and time."""
    graph = capture(*_stack("plain"), loss_fn=torch.sum)
    ours = replay(graph, uniform_segments(graph, 3))
    expected = checkpointed(*_stack("sequential"), loss_fn=torch.sum)
    assert (ours.peak_bytes, ours.cost_ns) == (expected.peak_bytes, expected.cost_ns)


def test_saved_matrix_products_are_what_selective_checkpointing_runs() -> None:
    """The same calls run again; random states, one a block, are held a little longer here."""
    graph = capture(*_stack("plain"), loss_fn=torch.sum)
    ours = replay(graph, save_matmuls_per_block(graph))
    expected = checkpointed(*_stack("selective"), loss_fn=torch.sum)
    assert ours.cost_ns == expected.cost_ns
    states_bytes = sum(
        graph.storages[op.outputs[0]].size_bytes
        for op in graph.operators
        if op.target == "get_rng_state"
    )
    assert states_bytes > 0
    assert abs(ours.peak_bytes - expected.peak_bytes) <= states_bytes
