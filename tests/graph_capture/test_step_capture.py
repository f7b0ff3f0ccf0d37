"""From a model and a sample to a cost graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from graph_capture.cost_graph import CostGraph
from graph_capture.step_capture import capture
from tests.capturing import capture_step, measure_optimizer
from tests.graph_capture.odd import (
    WIDTH,
    Three,
    mean_square,
    normal,
)

LINEAR_BYTES = (WIDTH * WIDTH + WIDTH) * 4
ROWS_BYTES = 16 * WIDTH * 4


def _graph(**options: object) -> CostGraph:
    captured = capture_step(
        Three(),
        {"x": normal(0, 16, WIDTH)},
        loss=mean_square,
        **options,  # type: ignore[arg-type]
    )
    return captured.graph


def _bytes_by_category(graph: CostGraph) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for storage in graph.storages:
        sizes[storage.category] = sizes.get(storage.category, 0) + storage.size_bytes
    return sizes


def test_sizes_by_hand() -> None:
    """Three layers: as many bytes of gradients as of parameters, one input, one output, loss."""
    sizes = _bytes_by_category(_graph())
    assert sizes["parameter"] == sizes["gradient"] == 3 * LINEAR_BYTES
    assert sizes["input"] == ROWS_BYTES
    # the output, the loss, its gradient and the element that stands for the tangent
    assert sizes["output"] == ROWS_BYTES + 3 * 4


def test_the_order_of_phases() -> None:
    """Forward, then the loss, then backward, then the optimizer."""
    optimizer = measure_optimizer("adam", Three())
    phases = [op.phase for op in _graph(optimizer=optimizer).operators]
    assert sorted(phases, key=["forward", "loss", "backward", "optimizer"].index) == phases
    assert phases.count("loss") == phases.count("optimizer") == 1


def test_the_state_of_the_optimizer_is_resident() -> None:
    """Adam's two copies and counters are there from the first moment."""
    optimizer = measure_optimizer("adam", Three())
    with_state, without = _graph(optimizer=optimizer), _graph()
    assert with_state.resident_bytes - without.resident_bytes == 6 * LINEAR_BYTES + 6 * 4


def test_the_same_step_has_the_same_fingerprint() -> None:
    """Two captures, of a copy too, have one fingerprint; another batch has another."""
    model, x = Three(), normal(0, 16, WIDTH)
    first = capture(model, x, loss_fn=mean_square)
    assert capture(model, x, loss_fn=mean_square) == first
    assert capture(copy.deepcopy(model), x, loss_fn=mean_square).fingerprint == first.fingerprint
    other = capture(model, normal(0, 8, WIDTH), loss_fn=mean_square)
    assert other.fingerprint != first.fingerprint


def test_a_captured_graph_survives_json() -> None:
    """A captured graph read from its JSON is the graph."""
    graph = _graph()
    assert CostGraph.from_json(graph.to_json()) == graph


def test_a_model_on_meta_is_captured() -> None:
    """A model without memory has the graph of one with memory, scratch included."""
    with torch.device("meta"):
        model = Three()
    graph = capture(model, torch.empty(16, WIDTH, device="meta"), loss_fn=torch.sum)
    real = capture(Three(), torch.zeros(16, WIDTH), loss_fn=torch.sum)
    assert graph.operators == real.operators


def test_autocast_is_captured() -> None:
    """Under bfloat16 autocast products run in bfloat16 and the casts are operators."""
    with torch.autocast("cpu", torch.bfloat16):
        graph = capture(Three(), normal(0, 16, WIDTH), loss_fn=lambda out: out.float().sum())
    targets = [op.target for op in graph.operators if op.phase == "forward"]
    assert any("_to_copy" in target for target in targets)
    (last,) = [op for op in graph.operators if op.module_path == "c" and "addmm" in op.target]
    assert graph.storages[last.outputs[0]].size_bytes == ROWS_BYTES // 2


def test_a_draw_has_its_generator_state() -> None:
    """Before each draw the state is recorded, 5056 bytes of which are the CPU generator's."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
    captured = capture_step(model, {"input": torch.zeros(2, 8)}, loss=torch.sum)
    ((draw, state),) = captured.state_of.items()
    assert state == draw - 1
    (k,) = captured.graph.operators[state].outputs
    assert captured.graph.storages[k].size_bytes == torch.get_rng_state().numel() == 5056


@pytest.mark.parametrize("sample", [(torch.zeros(16, WIDTH),), {"x": torch.zeros(16, WIDTH)}])
def test_samples_of_each_kind(sample: object) -> None:
    """A tuple and a dict are captured like the tensor itself."""
    expected = capture(Three(), torch.zeros(16, WIDTH), loss_fn=mean_square)
    assert capture(Three(), sample, loss_fn=mean_square).fingerprint == expected.fingerprint
