"""Blocks from module paths, from chains and from single operators."""

from __future__ import annotations

import pytest

from solvers.instances import load_instance
from solvers.strategies import StrategyError, find_blocks, module_blocks

from .graphs import INSTANCES
from .strategy_graphs import layered, transformer, unit_chain, with_paths


def _names(paths: list[str], targets: list[str] | None = None) -> list[str]:
    return [block.name for block in module_blocks(with_paths(paths, targets)).blocks]


def test_numbered_children_of_one_module() -> None:
    """Layers with their stretches; embedding, head and loss are in none."""
    blocks = module_blocks(transformer(2))
    assert [(b.name, b.begin, b.end) for b in blocks.blocks] == [("h.0", 1, 10), ("h.1", 10, 19)]
    assert len(module_blocks(layered(5))) == 5


def test_what_lies_between_blocks_belongs_to_a_group() -> None:
    """A residual sum in the parent's forward is in no block, but in a segment of two."""
    graph = with_paths(["blocks.0", "", "blocks.1", "", "blocks.2"])
    blocks = module_blocks(graph)
    assert [(b.begin, b.end) for b in blocks.blocks] == [(0, 1), (2, 3), (4, 5)]
    assert blocks.groups(2) == [range(3), range(4, 5)]
    with pytest.raises(StrategyError, match="at least one block"):
        blocks.groups(0)


def test_several_containers() -> None:
    """Encoder and decoder, and the four of a ResNet as torchvision names them."""
    assert _names(["enc.block.0.a", "enc.block.1.a", "mid", "dec.block.0.a", "dec.block.1.a"]) == [
        "enc.block.0",
        "enc.block.1",
        "dec.block.0",
        "dec.block.1",
    ]
    assert _names(["layer1.0.c", "layer1.1.c", "layer2.0.c"])[:2] == ["layer1.0", "layer1.1"]


def test_stages_that_hold_nothing_but_blocks() -> None:
    """Blocks of stages are the blocks when they are alike and feed each other."""
    paths = [f"stages.{s}.layers.{b}.{part}" for s in (0, 1) for b in (0, 1, 2) for part in "cd"]
    targets = ["aten.convolution.default", "aten.relu.default"] * 6
    assert _names(paths, targets) == [f"stages.{s}.layers.{b}" for s in (0, 1) for b in (0, 1, 2)]


def test_sublayers_that_are_not_alike() -> None:
    """Attention and feed-forward of a T5 block are no blocks of their own."""
    paths, targets = [], []
    for i in range(3):
        paths += [f"block.{i}.layer.0.a"] * 3 + [f"block.{i}.layer.1.a"] * 2
        targets += ["aten.bmm.default", "aten._softmax.default", "aten.bmm.default"]
        targets += ["aten.mm.default", "aten.gelu.default"]
    assert _names(paths, targets) == ["block.0", "block.1", "block.2"]


def test_a_module_that_is_called_again_is_another_block() -> None:
    """Shared layers: every call is a block."""
    assert _names(["l.0", "l.1", "l.0", "l.1"]) == ["l.0", "l.1", "l.0", "l.1"]


def test_one_linear_layer_with_a_number_is_no_block() -> None:
    """``classifier.1`` is the only numbered child with operators."""
    with pytest.raises(StrategyError, match="no repeated blocks"):
        module_blocks(with_paths(["features", "classifier.1"]))
    assert _names(["l.0", "l.1", "classifier.1"]) == ["l.0", "l.1"]


def test_without_paths_the_chain_is_cut() -> None:
    """Every layer of a plain chain; an instance by its cut points."""
    blocks = find_blocks(unit_chain(9))
    assert (len(blocks), blocks.origin) == (9, "chain")
    vgg = find_blocks(load_instance(INSTANCES / "cm_vgg_unet.json"))
    assert vgg.origin == "chain"
    assert [b.end for b in vgg.blocks[:-1]] == [b.begin for b in vgg.blocks[1:]]


def test_without_a_chain_operators_are_the_blocks() -> None:
    """G1 is a random graph."""
    blocks = find_blocks(load_instance(INSTANCES / "G1.json"))
    assert blocks.origin == "operators"
    assert all(block.end == block.begin + 1 for block in blocks.blocks)
