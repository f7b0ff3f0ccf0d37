"""Small language models, and how ``parallelize_module`` divides them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RANKS = 2
VOCABULARY, WIDTH, NUM_HEADS = 64, 32, 4


class Attention(nn.Module):
    """Causal attention of as many heads as its matrices make on this rank."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        query, key, value = (
            make(x).view(batch, length, -1, WIDTH // NUM_HEADS).transpose(1, 2)
            for make in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Gated(nn.Module):
    """The MLP of a LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """The MLP of a GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """Attention and an MLP, with dropout on what each adds."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(bias=not gated)
        self.mlp = Gated() if gated else Plain()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.first(x)))
        return x + self.dropout(self.mlp(self.second(x)))


class LanguageModel(nn.Module):
    """Embedding, layers, and a loss over the head."""

    def __init__(self, *, gated: bool, num_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(gated=gated) for _ in range(num_layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens.flatten())


def language_model(*, gated: bool, num_layers: int = 4) -> LanguageModel:
    """The model in training mode, the same in every process."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return LanguageModel(gated=gated, num_layers=num_layers).train()


class TransformersLlama(nn.Module):
    """A LLaMA of Transformers, with fewer heads of keys than of queries, and dropout."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=3,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=RANKS,
            max_position_embeddings=64,
            attention_dropout=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = LlamaForCausalLM(config)

    @property
    def layers(self) -> Any:
        """Its blocks."""
        return self.model.model.layers

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens, labels=tokens, use_cache=False).loss
        return loss


def transformers_llama(mesh: Any) -> nn.Module:
    """The model in training mode with the matrices of its layers divided, the same everywhere."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = TransformersLlama().train()
    columns = [f"self_attn.{part}_proj" for part in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    for layer in model.layers:
        plan: dict[str, Any] = {path: ColwiseParallel() for path in columns}
        rows = ("self_attn.o_proj", "mlp.down_proj")
        parallelize_module(layer, mesh, {**plan, **{path: RowwiseParallel() for path in rows}})
    return model


def tokens(seed: int = 0) -> Tensor:
    """A batch by the seed."""
    return torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(seed))


def divided(model: Any, mesh: Any, **outer: Any) -> Any:
    """Divide the matrices of each layer, as Megatron-LM does; in and out are whole tensors."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for layer in model.layers:
        columns = ["attention.query", "attention.key", "attention.value", "mlp.up"]
        columns += ["mlp.gate"] if isinstance(layer.mlp, Gated) else []
        plan = {path: ColwiseParallel() for path in columns}
        rows = {path: RowwiseParallel(**outer) for path in ("attention.out", "mlp.down")}
        parallelize_module(layer, mesh, {**plan, **rows})
    return model


def divided_along_the_sequence(model: Any, mesh: Any, *, local: bool = True) -> Any:
    """Divide what lies between the matrices along the sequence; embedding and head, too.

    Parameters
    ----------
    local
        Whether layers hand on plain tensors, and not ``DTensor``.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    outer = {"output_layouts": Shard(1), "use_local_output": local}
    parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), **outer),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    for layer in model.layers:
        plan = {}
        for norm, part in (("first", "attention"), ("second", "mlp")):
            plan[norm] = SequenceParallel()
            plan[part] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            )
        parallelize_module(layer, mesh, plan)
    return divided(model, mesh, **outer)


class CollectivesHeard:
    """Counts the collectives of this process by name, and lets gloo's threads free nothing.

    Those hold what a collective is given until it has ended. Where they are the last to let go of
    it, a record of memory does not hear of it; so it is held here until the result is waited for.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._given: dict[int, tuple[Any, ...]] = {}
        self._library = torch.library.Library("_c10d_functional", "IMPL")
        names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "wait_tensor")
        for name in names:
            self._library.impl(name, self._heard(name), "CPU")

    def _heard(self, name: str) -> Callable[..., Tensor]:
        own = getattr(torch.ops._c10d_functional, name).default

        def call(*args: Any) -> Tensor:
            self.counts[name] += 1
            result: Tensor = own._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
            if name != "wait_tensor":
                self._given[result.data_ptr()] = args
            else:
                self._given.pop(result.data_ptr(), None)
            return result

        return call

    def of(self, run: Callable[[], Any]) -> Counter[str]:
        """Return what a call communicates."""
        self.counts.clear()
        run()
        return Counter({name: n for name, n in self.counts.items() if name != "wait_tensor"})
