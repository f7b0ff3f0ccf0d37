"""Inputs for a model of Transformers, guessed from its signature and configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .subject import seeded
from .tiny_configs import IMAGE_SIZE, MEL_BINS, VOCABULARY

BATCH = 2
LENGTH = 16


def recipes(head: str, model: nn.Module) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Ways to make the inputs, the likeliest first."""
    config = model.config
    names = set(inspect.signature(model.forward).parameters)
    if "kwargs" in names:
        names |= {"labels"} if head not in ("MODEL",) else set()
    bases = list(_bases(names, config, model))
    for base in bases:
        for labels in _label_makers(head, names, config):
            yield _joined(base, labels)
    for base in bases:
        yield base


def _joined(base: Any, labels: Any) -> Callable[[int], dict[str, Any]]:
    def make(seed: int) -> dict[str, Any]:
        inputs = base(seed)
        return {**inputs, **labels(seed, inputs)}

    return make


def _bases(
    names: set[str], config: Any, model: nn.Module
) -> Iterator[Callable[[int], dict[str, Any]]]:
    main = getattr(model, "main_input_name", "input_ids")
    vision = _image_of(config)
    if "input_ids" in names and "pixel_values" in names and main in ("input_ids", "pixel_values"):
        yield from _image_text(names, config, model, vision)
    if "pixel_values_videos" in names and main == "pixel_values_videos":
        yield lambda seed: {"pixel_values_videos": _normal(seed, BATCH, 4, *vision)}
    if "input_features" in names and ("input_ids" not in names or main == "input_features"):
        for shape in ((MEL_BINS, 64), (64, MEL_BINS), (80, 64), (64, 80), (64, 160)):
            yield _with_decoder(
                names, config, lambda seed, s=shape: {"input_features": _normal(seed, BATCH, *s)}
            )
            yield _with_decoder(
                names,
                config,
                lambda seed, s=shape: {
                    "input_features": _normal(seed, BATCH, *s),
                    "attention_mask": torch.ones(
                        BATCH, s[0] if s[0] > s[1] else s[1], dtype=torch.long
                    ),
                },
            )
    if "input_values" in names and main == "input_values":
        yield _with_decoder(
            names, config, lambda seed: {"input_values": _normal(seed, BATCH, 4096)}
        )
        yield lambda seed: {"input_values": _normal(seed, BATCH, 1, 4096)}
        length = getattr(config, "max_length", None) or 64
        yield lambda seed: {"input_values": _normal(seed, BATCH, length, MEL_BINS)}
        yield lambda seed: {"input_values": _normal(seed, BATCH, 64, 80)}
    if "pixel_values" in names:
        channels = vision[0]
        frames = getattr(config, "num_frames", None)
        if frames:
            yield lambda seed: {"pixel_values": _normal(seed, BATCH, frames, *vision)}
        yield _with_decoder(
            names, config, lambda seed: {"pixel_values": _normal(seed, BATCH, *vision)}
        )
        for size in (64, 128, 224):
            yield lambda seed, size=size: {
                "pixel_values": _normal(seed, BATCH, channels, size, size)
            }
    if "input_ids" in names:
        yield _with_decoder(
            names, config, lambda seed: {"input_ids": _tokens(seed), **_mask(names)}
        )
        yield lambda seed: {"input_ids": _tokens(seed)}
        for side in (32, 64):
            yield lambda seed, side=side: {"input_ids": _tokens(seed, side)}
    if "past_values" in names:
        yield lambda seed: _series(seed, names, config)
    if "inputs" in names:
        yield lambda seed: {"inputs": _tokens(seed)}
    if main not in ("input_ids", "pixel_values", "input_features", "input_values", "past_values"):
        yield lambda seed: {main: _normal(seed, BATCH, LENGTH, 64)}


def _with_decoder(names: set[str], config: Any, base: Any) -> Callable[[int], dict[str, Any]]:
    def make(seed: int) -> dict[str, Any]:
        inputs = base(seed)
        if "decoder_input_ids" in names:
            inputs["decoder_input_ids"] = _tokens(seed + 50, 12)
        return inputs

    return make


def _image_text(
    names: set[str], config: Any, model: nn.Module, vision: tuple[int, int, int]
) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Text with as many placeholders as the image has features."""
    token = next(
        (
            getattr(config, name)
            for name in ("image_token_id", "image_token_index", "img_context_token_id")
            if isinstance(getattr(config, name, None), int)
        ),
        None,
    )
    extras: list[Callable[[int], dict[str, Any]]] = []
    if "image_grid_thw" in names:
        part = getattr(config, "vision_config", config)
        patch = getattr(part, "patch_size", 8)
        temporal = getattr(part, "temporal_patch_size", 1)
        channels = getattr(part, "in_channels", 3) or 3
        width = channels * temporal * patch * patch
        extras.append(
            lambda seed: {
                "pixel_values": _normal(seed, BATCH * 16, width),
                "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
            }
        )
    else:
        extras.append(lambda seed: {"pixel_values": _normal(seed, BATCH, *vision)})
        if "image_sizes" in names:
            extras.append(
                lambda seed: {
                    "pixel_values": _normal(seed, BATCH, 3, *vision),
                    "image_sizes": torch.tensor([[vision[1], vision[2]]] * BATCH),
                }
            )
            extras.append(
                lambda seed: {
                    "pixel_values": _normal(seed, BATCH, *vision),
                    "image_sizes": torch.tensor([[vision[1], vision[2]]] * BATCH),
                }
            )
        extras.append(lambda seed: {"pixel_values": _normal(seed, BATCH, 1, *vision)})
        extras.append(lambda seed: {"pixel_values": _normal(seed, BATCH, 2, *vision)})
    counts = (4, 16, 1, 17, 6, 5, 2, 8, 9, 64, 20, 32)
    for extra in extras:
        for count in counts if token is not None else (0,):

            def base(seed: int, extra: Any = extra, count: int = count) -> dict[str, Any]:
                ids = _tokens(seed, LENGTH + count)
                ids[:, 1 : 1 + count] = token if token is not None else 3
                inputs = {"input_ids": ids, **extra(seed)}
                if "attention_mask" in names:
                    inputs["attention_mask"] = torch.ones_like(ids)
                if "token_type_ids" in names and token is not None:
                    inputs["token_type_ids"] = (ids == token).long()
                if "mm_token_type_ids" in names and token is not None:
                    inputs["mm_token_type_ids"] = (ids == token).long()
                return inputs

            yield base
            if "decoder_input_ids" in names:
                yield _with_decoder(names, config, base)


def _label_makers(head: str, names: set[str], config: Any) -> Iterator[Any]:
    if "labels" not in names and "start_positions" not in names:
        return
    classes = int(getattr(config, "num_labels", 2) or 2)
    texts = ("CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "PRETRAINING")
    if head in texts:
        yield lambda seed, inputs: {"labels": inputs["input_ids"].clone()}
    if head in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT"):
        yield lambda seed, inputs: {"labels": _tokens(seed + 9, 12)}
    if head in ("CTC", "RNNT", "TDT"):
        few = min(VOCABULARY, int(getattr(config, "vocab_size", VOCABULARY))) - 4
        yield lambda seed, inputs: {"labels": _tokens(seed + 9, 4) % few + 1}
    if head in ("SEMANTIC_SEGMENTATION",):
        yield lambda seed, inputs: {
            "labels": torch.randint(
                0, classes, (BATCH, *inputs["pixel_values"].shape[-2:]), generator=seeded(seed)
            )
        }
    if head in ("OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION"):
        return
    if head in ("QUESTION_ANSWERING",):
        yield lambda seed, inputs: {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([3, 4]),
        }
        return
    if "CLASSIFICATION" in head and head != "TOKEN_CLASSIFICATION":
        yield lambda seed, inputs: {
            "labels": torch.randint(0, classes, (BATCH,), generator=seeded(seed))
        }
    if head == "TOKEN_CLASSIFICATION":
        yield lambda seed, inputs: {
            "labels": torch.randint(0, classes, inputs["input_ids"].shape, generator=seeded(seed))
        }


def _image_of(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a configuration is for."""
    for name in ("vision_config", "backbone_config", "encoder", "perception_encoder", "vit_config"):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            config = part
            break
    size = getattr(config, "image_size", None) or getattr(config, "img_size", None) or IMAGE_SIZE
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    if isinstance(channels, (list, tuple)):
        channels = 3
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(channels), int(height), int(width)


def _series(seed: int, names: set[str], config: Any) -> dict[str, Tensor]:
    length = (
        getattr(config, "context_length", None) or getattr(config, "seq_length", None) or LENGTH
    )
    lags = max(getattr(config, "lags_sequence", None) or [0])
    channels = getattr(config, "num_input_channels", 1) or 1
    future = getattr(config, "prediction_length", None) or 4
    features = getattr(config, "num_time_features", 0) or 0
    shape = (BATCH, length + lags)
    is_3d = "observed_mask" in names or channels > 1
    inputs: dict[str, Tensor] = {
        "past_values": _normal(seed, *shape, channels) if is_3d else _normal(seed, *shape)
    }
    if "past_time_features" in names:
        inputs["past_time_features"] = _normal(seed + 1, *shape, features)
        inputs["past_observed_mask"] = torch.ones(*shape)
        inputs["future_time_features"] = _normal(seed + 2, BATCH, future, features)
    if "future_values" in names:
        inputs["future_values"] = (
            _normal(seed + 3, BATCH, future, channels)
            if is_3d
            else _normal(seed + 3, BATCH, future)
        )
    if "past_values_mask" in names:
        inputs["past_values_mask"] = torch.ones(*shape)
    return inputs


def _mask(names: set[str]) -> dict[str, Tensor]:
    if "attention_mask" not in names:
        return {}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, -3:] = 0
    return {"attention_mask": mask}


def _tokens(seed: int, length: int = LENGTH) -> Tensor:
    # Special tokens lie at both ends of the vocabulary.
    return torch.randint(3, VOCABULARY - 28, (BATCH, length), generator=seeded(seed))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))
