"""Models of diffusers, tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .building import BATCH, made_of, normal, whole
from .subject import Subject, seeded

_UNET: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
}
_LATENT: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
}


def _noisy(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda seed: {
        "sample": normal(seed, BATCH, *shape),
        "timestep": whole(seed, 999, BATCH),
    }


def _latents(*shape: int, text: tuple[int, int], **more: Any) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {
        "hidden_states": normal(seed, BATCH, *shape),
        "encoder_hidden_states": normal(seed + 1, BATCH, *text),
        "timestep": whole(seed, 999, BATCH),
        **{k: v(seed) if callable(v) else v for k, v in more.items()},
    }


DIFFUSERS: dict[str, Callable[[], Subject]] = {
    "UNet2DModel": made_of(
        "diffusers",
        "UNet2DModel",
        _noisy(3, 16, 16),
        **_UNET,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "UNet2DConditionModel": made_of(
        "diffusers",
        "UNet2DConditionModel",
        lambda seed: {
            **_noisy(4, 16, 16)(seed),
            "encoder_hidden_states": normal(seed, BATCH, 6, 24),
        },
        **_UNET,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "UNet1DModel": made_of(
        "diffusers",
        "UNet1DModel",
        _noisy(2, 64),
        sample_size=64,
        in_channels=2,
        out_channels=2,
        extra_in_channels=16,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
    ),
    "AutoencoderKL": made_of(
        "diffusers",
        "AutoencoderKL",
        lambda seed: {"sample": normal(seed, BATCH, 3, 16, 16), "sample_posterior": True},
        **_LATENT,
    ),
    "VQModel": made_of(
        "diffusers",
        "VQModel",
        lambda seed: {"sample": normal(seed, BATCH, 3, 16, 16)},
        **{**_LATENT, "latent_channels": 3},
        num_vq_embeddings=32,
    ),
    "AutoencoderTiny": made_of(
        "diffusers",
        "AutoencoderTiny",
        lambda seed: {"sample": normal(seed, BATCH, 3, 16, 16)},
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "SD3Transformer2DModel": made_of(
        "diffusers",
        "SD3Transformer2DModel",
        _latents(4, 16, 16, text=(6, 32), pooled_projections=lambda seed: normal(seed, BATCH, 64)),
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    ),
    "FluxTransformer2DModel": made_of(
        "diffusers",
        "FluxTransformer2DModel",
        lambda seed: {
            "hidden_states": normal(seed, BATCH, 16, 4),
            "encoder_hidden_states": normal(seed + 1, BATCH, 6, 32),
            "pooled_projections": normal(seed, BATCH, 32),
            "timestep": torch.rand(BATCH, generator=seeded(seed)),
            "img_ids": normal(seed, 16, 3),
            "txt_ids": normal(seed, 6, 3),
        },
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    "DiTTransformer2DModel": made_of(
        "diffusers",
        "DiTTransformer2DModel",
        lambda seed: {
            "hidden_states": normal(seed, BATCH, 4, 8, 8),
            "timestep": whole(seed, 999, BATCH),
            "class_labels": whole(seed, 9, BATCH),
        },
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    ),
    "PixArtTransformer2DModel": made_of(
        "diffusers",
        "PixArtTransformer2DModel",
        _latents(
            4, 8, 8, text=(6, 16), added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ),
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
        use_additional_conditions=False,
    ),
    "CogVideoXTransformer3DModel": made_of(
        "diffusers",
        "CogVideoXTransformer3DModel",
        _latents(3, 4, 8, 8, text=(6, 16)),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    ),
    "WanTransformer3DModel": made_of(
        "diffusers",
        "WanTransformer3DModel",
        _latents(4, 2, 8, 8, text=(6, 16)),
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ),
    "AuraFlowTransformer2DModel": made_of(
        "diffusers",
        "AuraFlowTransformer2DModel",
        lambda seed: {
            **_latents(4, 8, 8, text=(6, 16))(seed),
            "timestep": torch.rand(BATCH, generator=seeded(seed)),
        },
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    ),
    "PriorTransformer": made_of(
        "diffusers",
        "PriorTransformer",
        lambda seed: {
            "hidden_states": normal(seed, BATCH, 16),
            "timestep": 5,
            "proj_embedding": normal(seed, BATCH, 16),
            "encoder_hidden_states": normal(seed, BATCH, 7, 16),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=7,
        additional_embeddings=4,
    ),
}
