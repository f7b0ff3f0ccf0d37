"""A small language model, data for it, and what a whole training comes to."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from graph_capture.costs.allocator import peak_extra_bytes

VOCABULARY = 128
LENGTH = 32


def language_model(dropout: float = 0.1, layers: int = 2, width: int = 32) -> nn.Module:
    """A GPT-2 of two layers, the same one each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=2,
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        return GPT2LMHeadModel(config).train()


class Texts(Dataset):
    """Rows of random tokens, all of one length or of four."""

    def __init__(self, rows: int = 64, *, many_lengths: bool = False, seed: int = 1) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(rows):
            quarters = int(torch.randint(1, 5, (), generator=draws)) if many_lengths else 4
            length = quarters * LENGTH // 4
            ids = torch.randint(1, VOCABULARY, (length,), generator=draws)
            self.rows.append({"input_ids": ids, "labels": ids, "attention_mask": ids * 0 + 1})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate rows as long as the longest of them."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}

    def pad(row: Tensor, value: int) -> Tensor:
        return nn.functional.pad(row, (0, longest - len(row)), value=value)

    return {
        name: torch.stack([pad(row[name], value) for row in rows]) for name, value in fill.items()
    }


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to.

    Parameters
    ----------
    losses
        What was logged, but for times.
    state
        The final weights.
    peak_bytes
        The most that was allocated, with what was there before the training.
    """

    losses: list[Any]
    state: dict[str, Tensor]
    peak_bytes: int


def trained(
    model: nn.Module, train: Callable[[], list[Any]], others: tuple[nn.Module, ...] = ()
) -> Trained:
    """Train and record; ``train`` returns the losses."""
    resident = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for module in (model, *others)
        for t in (*module.parameters(), *module.buffers())
    }
    losses: list[Any] = []
    gc.collect()
    extra_bytes = peak_extra_bytes(lambda: losses.extend(train()))
    return Trained(
        losses=losses,
        state={name: tensor.clone() for name, tensor in model.state_dict().items()},
        peak_bytes=sum(resident.values()) + extra_bytes,
    )


def assert_same(expected: Trained, actual: Trained) -> None:
    """The same loss curve and the same weights, to the last bit."""
    assert expected.losses
    assert expected.losses == actual.losses
    assert expected.state.keys() == actual.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(tensor, actual.state[name]), name
