"""User set-ups: wrappers, losses, samplers and modules that belong to no library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .own_modules import (
    WIDTH,
    BranchingDepth,
    ConformerCtc,
    DenseExperts,
    Deq,
    DistributionVae,
    FiniteAssert,
    FourierOperator,
    Gate,
    GaussianProcess,
    LoggedNorm,
    MaskedLoss,
    OwnCheckpoint,
    PackedLstm,
    PhysicsInside,
    PlainRnn,
    RoutedExperts,
    Siren,
    SmallUnet,
    Spectrogram,
    Stack,
    StochasticDepth,
    Swish,
    Vae,
    Vq,
)
from .subject import NotInstalled, Subject, mean_square, seeded

BATCH = 8


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def _rows(seed: int) -> tuple[Tensor]:
    return (_normal(seed, BATCH, WIDTH),)


def _pictures(seed: int) -> tuple[Tensor]:
    return (_normal(seed, 4, 3, 16, 16),)


def _tokens(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (4, 16), generator=seeded(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def all_pairs(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of ten points in each of two molecules, with its distance."""
    first, second = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    different = first != second
    pairs = torch.stack([first[different], second[different]])
    pairs = torch.cat([pairs, pairs + 10], dim=1)
    return pairs, (positions[pairs[0]] - positions[pairs[1]]).norm(dim=-1)


# -- six language models -----------------------------------------------------------


def _llama(kind: str = "llama", **options: Any) -> nn.Module:
    import transformers as T

    narrow: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if kind == "gpt2":
        config: Any = T.GPT2Config(
            vocab_size=100,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            **options,
        )
        return T.GPT2LMHeadModel(config).train()
    if kind == "bert":
        return T.BertForMaskedLM(T.BertConfig(**narrow, **options)).train()
    if kind == "t5":
        return T.T5ForConditionalGeneration(
            T.T5Config(
                vocab_size=100,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                **options,
            )
        ).train()
    names = {"llama": "Llama", "mixtral": "Mixtral", "gemma": "Gemma"}
    if kind == "mixtral":
        options["num_local_experts"] = 4
    config = getattr(T, names[kind] + "Config")(
        **narrow, num_key_value_heads=2, head_dim=8, pad_token_id=0, **options
    )
    return getattr(T, names[kind] + "ForCausalLM")(config).train()


LANGUAGE_MODELS = ("gpt2", "llama", "mixtral", "gemma", "bert", "t5")


def _plain(kind: str) -> nn.Module:
    return _llama(kind)


def _checkpointed(kind: str) -> nn.Module:
    model = _llama(kind)
    (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )()
    return model


def _frozen_half(kind: str) -> nn.Module:
    model = _llama(kind)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    return model


def _tied(kind: str) -> nn.Module:
    return _llama(kind, tie_word_embeddings=True)


def _lora(kind: str) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise NotInstalled(f"peft is not installed ({error})") from error
    targets = {"gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"]}
    config = peft.LoraConfig(
        r=4,
        lora_dropout=0.1,
        target_modules=targets.get(kind, ["q_proj", "v_proj"]),
        fan_in_fan_out=kind == "gpt2",
    )
    return peft.get_peft_model(_llama(kind), config).train()


def _double(kind: str) -> nn.Module:
    return _llama(kind).double()


def _language(kind: str, build: Callable[[str], nn.Module]) -> Callable[[], Subject]:
    return lambda: Subject(make=lambda: build(kind), sample=_tokens)


def _under_autocast(kind: str) -> Callable[[], Subject]:
    return lambda: Subject(
        make=lambda: _llama(kind),
        sample=_tokens,
        context=lambda: torch.autocast("cpu", torch.bfloat16),
    )


def _own(
    make: Callable[[], nn.Module],
    sample: Callable[[int], Any],
    loss_fn: Any = None,
    **options: Any,
) -> Callable[[], Subject]:
    return lambda: Subject(make=lambda: make().train(), sample=sample, loss_fn=loss_fn, **options)


def _scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), torch.jit.script(Gate()), nn.Linear(WIDTH, 8))


def _weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
    )


def _torch_transformer() -> nn.Module:
    return nn.Transformer(WIDTH, 4, 2, 2, 48, batch_first=True)


_LENGTHS = torch.tensor([16, 9, 12, 5])

SETUPS: dict[str, Callable[[], Subject]] = {
    **{f"{k}": _language(k, _plain) for k in LANGUAGE_MODELS},
    **{f"{k}, own checkpointing": _language(k, _checkpointed) for k in LANGUAGE_MODELS},
    **{f"{k}, half frozen": _language(k, _frozen_half) for k in LANGUAGE_MODELS},
    **{f"{k}, tied": _language(k, _tied) for k in LANGUAGE_MODELS if k != "t5"},
    **{f"{k}, LoRA": _language(k, _lora) for k in LANGUAGE_MODELS},
    **{f"{k}, autocast bf16": _under_autocast(k) for k in LANGUAGE_MODELS},
    "llama, double": _language("llama", _double),
    "custom Function": _own(lambda: Stack(Swish.apply), _rows, mean_square),
    "checkpoint with dropout": _own(OwnCheckpoint, _rows, mean_square),
    "stochastic depth by mask": _own(StochasticDepth, _rows, mean_square),
    "stochastic depth by branch": _own(BranchingDepth, _rows, mean_square),
    "packed LSTM": _own(
        PackedLstm,
        lambda seed: (torch.randint(0, 50, (4, 16), generator=seeded(seed)), _LENGTHS),
        mean_square,
    ),
    "LSTM": _own(
        lambda: PlainRnn(nn.LSTM), lambda seed: (_normal(seed, 4, 8, WIDTH),), mean_square
    ),
    "GRU": _own(lambda: PlainRnn(nn.GRU), lambda seed: (_normal(seed, 4, 8, WIDTH),), mean_square),
    "experts by index": _own(RoutedExperts, _rows, mean_square),
    "experts, dense": _own(DenseExperts, _rows, mean_square),
    "physics inside": _own(
        PhysicsInside, lambda seed: (torch.rand(64, 2, generator=seeded(seed)).requires_grad_(),)
    ),
    "U-Net": _own(SmallUnet, _pictures, mean_square),
    "conformer CTC": _own(
        ConformerCtc,
        lambda seed: (
            _normal(seed, 4, 24, WIDTH),
            torch.randint(1, 10, (4, 5), generator=seeded(seed)),
            torch.tensor([5, 3, 4, 2]),
        ),
    ),
    "VAE": _own(Vae, _rows),
    "VAE of distributions": _own(DistributionVae, _rows),
    "VQ": _own(Vq, _rows),
    "Gaussian process": _own(
        GaussianProcess, lambda seed: (_normal(seed, 24, WIDTH), _normal(seed + 1, 24))
    ),
    "Fourier operator": _own(FourierOperator, lambda seed: (_normal(seed, 4, 2, 32),), mean_square),
    "spectrogram": _own(Spectrogram, lambda seed: (_normal(seed, 4, 256),)),
    "scripted submodule": _own(_scripted, _rows, mean_square),
    "loss over a boolean mask": _own(
        MaskedLoss, lambda seed: (_normal(seed, BATCH, WIDTH), torch.arange(BATCH) % 2 == 0)
    ),
    "item for a log": _own(LoggedNorm, _rows, mean_square),
    "assert isfinite": _own(FiniteAssert, _rows, mean_square),
    "fixed point": _own(Deq, _rows, mean_square),
    "sine network": _own(
        Siren, lambda seed: (torch.rand(64, 2, generator=seeded(seed)),), mean_square
    ),
    "parametrized weights": _own(_weight_normed, _rows, mean_square),
    "nn.Transformer": _own(
        _torch_transformer,
        lambda seed: (_normal(seed, 2, 8, WIDTH), _normal(seed + 1, 2, 6, WIDTH)),
        mean_square,
    ),
}
"""By name."""
