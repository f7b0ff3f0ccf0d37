"""The steps on which solvers are compared: files, and steps generated on the spot.

A name is a path (an instance's JSON, or a folder of them) or ``family:size``:

- ``chain:F``: a training step of F layers in a row, of unequal cost and size;
- ``layered:N``: a random layered DAG of N operators, of the kind in the experiments of
  Bartan et al., *MOCCASIN: Efficient Tensor Rematerialization for Neural
  Networks* (ICML 2023, arXiv:2304.14463); our own generator, not their data;
- ``gpt2:L``, ``bert:L``: a captured step of L layers of width 768 (batch 4,
  512 tokens), without weights and therefore without kernels' scratch memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.instances import instance_from_dict

DEFAULT = ("chain:24", "layered:60", "layered:100", "gpt2:6", "bert:6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A step to plan, and its name."""

    name: str
    graph: CostGraph


def find_instances(names: Sequence[str], *, seed: int = 0) -> list[Instance]:
    """Load or make the named instances.

    Parameters
    ----------
    seed
        For the random families.

    Raises
    ------
    ValueError
        When a name is neither a path nor ``family:size``, or a folder is empty.
    """
    found: list[Instance] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(path.glob("*.json"))
            if not files:
                raise ValueError(f"no *.json in {name}")
            found.extend(load(file) for file in files)
        elif path.is_file():
            found.append(load(path))
        else:
            found.append(made_on_the_spot(name, seed))
    return found


def load(path: Path) -> Instance:
    """Read a cost graph's own JSON, or a plain DAG (``solvers/instances.py``)."""
    data = json.loads(path.read_text(encoding="utf-8"))
    graph = CostGraph.from_dict(data) if "format" in data else instance_from_dict(data)
    return Instance(name=path.stem, graph=graph)


def made_on_the_spot(name: str, seed: int) -> Instance:
    """The instance of ``family:size``."""
    family, _, size = name.partition(":")
    if family not in FAMILIES or not size.isdigit() or int(size) < 2:
        raise ValueError(
            f"{name!r} is neither a path nor one of "
            f"{', '.join(f'{known}:SIZE' for known in FAMILIES)} with a size of 2 or more"
        )
    return Instance(name=name, graph=FAMILIES[family](int(size), seed))


def chain(num_layers: int, seed: int) -> CostGraph:
    """Forward, loss and backward of layers in a row; backward costs about twice forward."""
    rng = Random(seed)
    cost_ns = [rng.randint(100, 1000) for _ in range(num_layers)]
    size_bytes = [rng.randint(100, 1000) for _ in range(num_layers)]
    operators: list[Operator] = []
    storages: list[Storage] = []

    def add(name: str, inputs: list[int], cost: int, size: int, *, forward: bool) -> None:
        storages.append(Storage(name=f"{name}.out", size_bytes=size, producer=len(operators)))
        operators.append(
            Operator(
                name=name,
                inputs=tuple(inputs),
                outputs=(len(storages) - 1,),
                cost_ns=cost,
                phase="forward" if forward else "backward",
            )
        )

    for i in range(num_layers):
        add(f"f{i}", [i - 1] if i else [], cost_ns[i], size_bytes[i], forward=True)
    add("loss", [num_layers - 1], 10, size_bytes[-1], forward=True)
    for i in reversed(range(num_layers)):
        reads = [len(operators) - 1, i, *([i - 1] if i else [])]
        add(f"b{i}", reads, 2 * cost_ns[i], size_bytes[max(i - 1, 0)], forward=False)
    return CostGraph(tuple(operators), tuple(storages))


def layered(num_operators: int, seed: int) -> CostGraph:
    """Layers of random width; each operator reads the layer before, and often far back.

    About 2.5 edges per operator. Every result is read, except those of the last layer.
    """
    rng = Random(seed)
    layers: list[list[int]] = []
    while (made := sum(map(len, layers))) < num_operators:
        width = min(rng.randint(1, max(2, round(num_operators**0.5))), num_operators - made)
        layers.append(list(range(made, made + width)))
    reads: list[set[int]] = [set() for _ in range(num_operators)]
    for depth, layer in enumerate(layers[1:], start=1):
        before = layers[depth - 1]
        for v in layer:
            reads[v].update(rng.sample(before, min(len(before), rng.choice([1, 1, 2]))))
            while rng.random() < 0.5:
                reads[v].add(rng.choice(layers[rng.randrange(depth)]))
        for u in before:
            if not any(u in reads[v] for v in layer):
                reads[rng.choice(layer)].add(u)
    storages = tuple(
        Storage(name=f"s{v}", size_bytes=rng.randint(50, 500) * 10, producer=v)
        for v in range(num_operators)
    )
    operators = tuple(
        Operator(
            name=f"o{v}",
            inputs=tuple(sorted(reads[v])),
            outputs=(v,),
            cost_ns=rng.randint(0, 1000),
        )
        for v in range(num_operators)
    )
    return CostGraph(operators, storages)


def gpt2(num_layers: int, seed: int) -> CostGraph:
    """A captured GPT-2 step; ``seed`` changes nothing."""
    _quiet_transformers()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from graph_capture import capture

    config = GPT2Config(
        n_layer=num_layers,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        loss_type="ForCausalLMLoss",
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).train()
        tokens = torch.zeros(4, 512, dtype=torch.long)
    return capture(model, {"input_ids": tokens, "labels": tokens})


def bert(num_layers: int, seed: int) -> CostGraph:
    """A captured step of BERT's masked language model; ``seed`` changes nothing."""
    _quiet_transformers()
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from graph_capture import capture

    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(num_hidden_layers=num_layers)).train()
        tokens = torch.zeros(4, 512, dtype=torch.long)
    return capture(model, {"input_ids": tokens, "labels": tokens})


def _quiet_transformers() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)


FAMILIES: dict[str, Callable[[int, int], CostGraph]] = {
    "chain": chain,
    "layered": layered,
    "gpt2": gpt2,
    "bert": bert,
}
