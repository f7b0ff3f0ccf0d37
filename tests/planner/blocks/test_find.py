"""Which modules are a model's blocks."""

from __future__ import annotations

import re

import pytest
from torch import nn

from planner import PlanError
from planner.blocks.find import find_blocks, smaller_blocks


def _layer() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.GELU())


def _model() -> nn.Module:
    layers = nn.ModuleList(
        nn.ModuleDict({"parts": nn.ModuleList([_layer(), _layer()])}) for _ in range(2)
    )
    return nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": layers, "head": nn.Linear(2, 2)})


def test_a_pattern_takes_one_part_of_a_path_at_a_time() -> None:
    """``layers.*`` is the layers, and not what is inside them."""
    assert find_blocks(_model(), "layers.*") == ("layers.0", "layers.1")


def test_auto_takes_the_outermost_lists() -> None:
    """The lists inside of layers are theirs."""
    assert find_blocks(_model(), "auto") == ("layers.0", "layers.1")


@pytest.mark.parametrize("blocks", [["auto", "head"], ("layers.*", "auto")])
def test_auto_stands_alone(blocks: object) -> None:
    """Beside a pattern it would mean one more set of blocks; in a list by itself it is itself."""
    with pytest.raises(ValueError, match="'auto' chooses all blocks by itself and cannot be"):
        find_blocks(_model(), blocks)
    assert find_blocks(_model(), ["auto"]) == find_blocks(_model(), "auto")


def test_several_patterns_are_taken_in_the_order_of_the_modules() -> None:
    """Whatever the order in which they are written."""
    found = find_blocks(_model(), ["head", "layers.1"])
    assert found == ("layers.1", "head")


def test_a_pattern_without_a_match_names_what_there_is() -> None:
    """The nearest path is in the message."""
    with pytest.raises(ValueError, match=r"no module .* is at 'layer\.0'; there is 'layers\.0'"):
        find_blocks(_model(), "layer.0")


def test_blocks_inside_blocks_are_refused() -> None:
    """One of the two has to go."""
    with pytest.raises(PlanError, match=r"'layers\.0\.parts\.1' lies inside block 'layers\.0'"):
        find_blocks(_model(), ["layers.0", "layers.*.parts.1"])


def test_a_model_without_lists_has_to_name_its_blocks() -> None:
    """``auto`` finds nothing in two linear layers, nor where stages have names of their own."""
    with pytest.raises(PlanError, match="has no list of layers: plan its whole step"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "auto")
    stages = {name: nn.Sequential(nn.Linear(2, 2)) for name in ("down", "up")}
    named = re.escape("blocks=['net.down', 'net.up']")
    with pytest.raises(PlanError, match=named):
        find_blocks(nn.ModuleDict({"net": nn.ModuleDict(stages)}), "auto")


def test_an_unfit_block_gives_way_to_the_layers_inside() -> None:
    """Its own list takes its place, in order."""
    found = smaller_blocks(_model(), ("layers.0", "layers.1"), {"layers.0"})
    assert found == ("layers.0.parts.0", "layers.0.parts.1", "layers.1")


class _Layer(nn.Module):
    """Attention, and experts in a list of one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(2, 2))
        self.norm = nn.LayerNorm(2)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
        self.frozen = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)


def test_a_layer_without_lists_is_divided_into_its_parts() -> None:
    """Composed and trained ones, for all the layers that are not fit."""
    model = nn.ModuleDict({"layers": nn.ModuleList([_Layer(), _Layer(), _Layer()])})
    paths = ("layers.0", "layers.1", "layers.2")
    assert smaller_blocks(model, paths, {"layers.0", "layers.2"}) == (
        "layers.0.attention",
        "layers.0.experts.0",
        "layers.1",
        "layers.2.attention",
        "layers.2.experts.0",
    )
