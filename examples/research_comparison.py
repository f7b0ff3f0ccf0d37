"""A strategy of your own beside published ones: one graph, one judge, real steps."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from graph_capture import CostGraph
from planner import compare
from solvers import Schedule
from solvers.strategies import schedule_for_saved


def save_every_kth(graph: CostGraph, budget_bytes: int | None) -> Iterator[Schedule]:
    """Save every k-th storage, for k from 2 to 6; the rest is recomputed when it is needed."""
    for k in range(2, 7):
        yield schedule_for_saved(graph, saved=range(0, len(graph.storages), k))


def main(
    num_layers: int = 4,
    width: int = 64,
    batch: int = 16,
    measure: bool = True,
    out: Path = Path("comparison.csv"),
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steadier times on a shared machine
    block = nn.TransformerEncoderLayer(width, 4, batch_first=True)
    model = nn.TransformerEncoder(block, num_layers, enable_nested_tensor=False)
    table = compare(
        model,
        torch.randn(batch, 64, width),
        loss_fn=torch.sum,
        budgets=["uniform_sqrt"],
        strategies=["uniform_sqrt", "transformers_per_layer", save_every_kth, "auto"],
        peers=["checkpoint_per_block"] if measure else [],
        measure=measure,
        repeats=2,
        time_limit_s=2,
    )
    print(table)
    table.save(out)


if __name__ == "__main__":
    main()
