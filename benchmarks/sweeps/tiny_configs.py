"""Configurations of Transformers, shrunk by the names of their fields.

Nobody writes 600 small configurations by hand. A field's name says what it means, and
Transformers is consistent enough about names: widths become 64, layers 2, heads 4,
vocabularies 128, images 32 pixels, experts 4. Families that need more have an entry in
:data:`OVERRIDES`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

WIDTH = 64
HEADS = 4
HEAD_DIM = WIDTH // HEADS
LAYERS = 2
VOCABULARY = 128
IMAGE_SIZE = 32
PATCH_SIZE = 8
MEL_BINS = 16

_RULES: tuple[tuple[str, int], ...] = (
    (r"num_mel_bins|num_mels|mel_bins|n_mels|feature_size|input_feat_per_channel", MEL_BINS),
    (r"(num_|n_)?(key_value|kv)_heads|num_key_value_heads|num_kv_heads|.*_kv_heads", 2),
    (r".*attention_heads|num_heads|n_heads?|.*_heads|heads", HEADS),
    (r"num_nextn_predict_layers|num_mtp.*", 0),
    (r"first_k_dense_replace", 1),
    (r"num_(single_|double_|hidden_)?layers|n_layers?|.*_layers|layers|depth|.*_depth", LAYERS),
    (r"num_(hidden_)?blocks|n_blocks|.*_blocks", LAYERS),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|.*num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|num_selected_experts|.*experts_per_tok", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"vocab_size.*|.*vocab_size|n_vocab|.*vocab_size_.*", VOCABULARY),
    (
        r"(moe_)?intermediate_size|.*_intermediate_size|intermediate_dim|.*intermediate_.*size",
        WIDTH,
    ),
    (
        r".*ffn_dim|d_ff|n_inner|dim_feedforward|ffn_hidden_size|.*ffn_size|mlp_dim|.*_ffn_.*dim",
        WIDTH,
    ),
    (
        r"head_dim|d_kv|.*head_dim|key_dim|value_dim|.*head_size|attention_head_dim|.*_channels_per_head",
        HEAD_DIM,
    ),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|rotary_dim|.*lora_rank|.*_lora_dim", HEAD_DIM),
    (
        r"hidden_size|.*hidden_size|d_model|n_embd|embed_dim|.*embed_dim|.*_hidden_dim|hidden_dim|dim",
        WIDTH,
    ),
    (r".*embedding_size|.*embed_size|.*hidden_channels|decoder_hidden|width|encoder_dim", WIDTH),
    (
        r"projection_dim|proj_dim|.*projection_size|.*projection_dim|.*_proj_size|out_hidden_size",
        WIDTH,
    ),
    (r"fusion_hidden_size|lru_width|mamba_d_ssm|output_dim|out_dim|classifier_proj_size", WIDTH),
    (r"d_state|state_size|mamba_d_state|ssm_state_size", 8),
    (r"image_size|img_size|.*image_size|input_size|sample_size", IMAGE_SIZE),
    (r"num_queries|num_query_tokens|num_object_queries|n_queries|.*num_queries|num_latents", 6),
    (r"d_latents", WIDTH),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 2),
    (r"max_source_positions", 32),
    (r"codebook_size|num_codevectors_per_group|num_embeddings", 32),
    (r"codevector_dim|codebook_dim|proj_codevector_dim", 16),
    (
        r"attention_window|local_attention.*|sliding_window|attention_chunk_size|chunk_size|block_size",
        8,
    ),
    (r"num_frames", 4),
)

_KEEP_LISTS = (
    "kernel",
    "stride",
    "ratio",
    "dilation",
    "padding",
    "ids",
    "scale",
    "mean",
    "std",
    "size",
    "factor",
    "indices",
    "groups",
    "levels",
    "offset",
)

_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_OWN_BACKBONE: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {**_RESNET, "out_features": ["stage4"]},
}

_THREE_AXES: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 3, 3],
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "detr": _OWN_BACKBONE,
    "conditional_detr": _OWN_BACKBONE,
    "dab-detr": _OWN_BACKBONE,
    "table-transformer": _OWN_BACKBONE,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1]},
    "qwen2_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen2_5_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen3_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen3_vl_moe_text": {"rope_parameters": _THREE_AXES},
    "deformable_detr": {**_OWN_BACKBONE, "backbone_config": _RESNET},
}
"""By model type, what the rules would leave to a library that may not be installed."""


def tiny_config(config_class: type, **overrides: Any) -> Any:
    """An instance of a configuration's class, as small as the rules make it.

    Parameters
    ----------
    config_class
        A configuration class of Transformers.
    overrides
        Fields whose given values are used.
    """
    overrides = {**OVERRIDES.get(getattr(config_class, "model_type", ""), {}), **overrides}
    try:
        default = config_class()
    except Exception as error:  # noqa: BLE001  # a composite one that has no default of its own
        default = _from_parts(config_class, error)
    signature = inspect.signature(config_class.__init__).parameters
    inherited = _inherited()
    options: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in inherited:
            continue
        known = name in signature or name in getattr(config_class, "sub_configs", {})
        if not known:
            continue
        small = _small(name, value)
        if small is not None:
            options[name] = small
    _token_ids(default, options, signature)
    if "qk_rope_head_dim" in options:
        # Keys are made per query head, and a head's width is the sum of its two parts.
        options.pop("head_dim", None)
        if "num_key_value_heads" in options:
            options["num_key_value_heads"] = HEADS
    options.update(overrides)
    return config_class(**options)


def _inherited() -> frozenset[str]:
    from transformers import PreTrainedConfig

    return frozenset(vars(PreTrainedConfig())) - {"num_labels"}


def _from_parts(config_class: type, error: Exception) -> Any:
    from transformers import AutoConfig

    parts = {}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if part is AutoConfig:
            raise error
        parts[name] = tiny_config(part)
    if not parts:
        raise error
    return config_class(**parts)


def _small(name: str, value: Any) -> Any:
    """The small value of one field; ``None`` to keep its default."""
    from transformers import PreTrainedConfig

    if isinstance(value, PreTrainedConfig):
        return tiny_config(type(value))
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return _small_number(name, value)
    if isinstance(value, (list, tuple)) and value:
        return _small_list(name, value)
    if isinstance(value, dict):
        return _small_dict(name, value)
    return None


def _small_number(name: str, value: int) -> int | None:
    if name == "patch_size" or name.endswith("patch_size"):
        return PATCH_SIZE if value >= PATCH_SIZE else None
    if "max_position" in name or name in ("n_positions", "n_ctx", "max_seq_len", "seq_length"):
        return min(value, 128) if value > 0 else None
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            return min(value, small) if value > 0 else None
    return None


def _small_list(name: str, value: Any) -> Any:
    if re.search(r"layer_types|layers_block_type|block_types|attention_types|layers_types", name):
        return None
    if name in ("image_size", "img_size", "sample_size"):
        return type(value)([IMAGE_SIZE] * len(value))
    if name == "patch_size":
        return type(value)(min(v, PATCH_SIZE) for v in value)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return None
    if any(part in name for part in _KEEP_LISTS) and "hidden_sizes" not in name:
        return None
    if re.search(r"^depth$|depths|num_.*layers|num_.*blocks|^layers$|num_blocks", name):
        return type(value)(min(v, 2) for v in value)
    if "heads" in name:
        return type(value)(min(v, 2) for v in value)
    if max(value) > WIDTH and re.search(r"dim|sizes|width|channels|embed", name):
        return type(value)(max(16, v * WIDTH // max(value) // 16 * 16) for v in value)
    return None


def _small_dict(name: str, value: dict[str, Any]) -> Any:
    section = value.get("mrope_section")
    if isinstance(section, list):
        total = sum(section)
        parts = [s * HEAD_DIM // 2 // total for s in section]
        parts[0] += HEAD_DIM // 2 - sum(parts)
        return {**value, "mrope_section": parts}
    return None


def _token_ids(default: Any, options: dict[str, Any], signature: Any) -> None:
    """Move special tokens into the small vocabulary, each to a different number."""
    low = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    high = VOCABULARY - 1
    for name, value in vars(default).items():
        if name not in signature:
            continue
        if isinstance(value, list) and name in low:
            value = value[0]
        if name in low:
            if value is not None or name == "pad_token_id":
                options[name] = low[name]
        elif (
            re.search(r"token_(id|index)$|_token_idx$", name)
            and isinstance(value, int)
            and (value >= VOCABULARY or re.search("image|video|audio", name))
        ):
            options[name] = high
            high -= 1
