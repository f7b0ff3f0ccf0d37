"""Models of other libraries, and user set-ups, which a sweep of model families misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import setups
from .building import BATCH, imported, made_of, normal, whole
from .diffusers_models import DIFFUSERS
from .subject import Subject, mean_square
from .timm_models import TIMM


def _graph(seed: int) -> tuple[Tensor, Tensor]:
    # One graph, new features: a plan guards what it learns about a graph.
    return normal(seed, 60, 16), whole(0, 60, 2, 240)


def _points(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return whole(seed, 9, 20), normal(seed, 20, 3), torch.arange(2).repeat_interleave(10)


_PYG: dict[str, Callable[[], Subject]] = {
    **{
        name: made_of("torch_geometric.nn", name, _graph, 16, 32, 2, 7, dropout=0.2)
        for name in ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")
        if name != "PNA"
    },
    "GATv2": made_of("torch_geometric.nn", "GAT", _graph, 16, 32, 2, 7, dropout=0.2, v2=True),
    "PNA": made_of(
        "torch_geometric.nn",
        "PNA",
        _graph,
        16,
        32,
        2,
        7,
        aggregators=["mean", "max", "std"],
        scalers=["identity", "amplification"],
        deg=torch.tensor([1, 2, 4, 8, 4, 2, 1]),
    ),
    "SchNet": made_of(
        "torch_geometric.nn",
        "SchNet",
        _points,
        hidden_channels=16,
        num_filters=16,
        num_interactions=2,
        num_gaussians=8,
        interaction_graph=setups.all_pairs,
    ),
    "TransformerConv": made_of("torch_geometric.nn", "TransformerConv", _graph, 16, 8, heads=2),
    "ChebConv": made_of("torch_geometric.nn", "ChebConv", _graph, 16, 8, K=3),
}


def _image(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda seed: (normal(seed, BATCH, *shape),)


_MONAI: dict[str, Callable[[], Subject]] = {
    "UNet": made_of(
        "monai.networks.nets",
        "UNet",
        _image(1, 32, 32),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
        num_res_units=1,
        dropout=0.1,
    ),
    "UNet 3D": made_of(
        "monai.networks.nets",
        "UNet",
        _image(1, 16, 16, 16),
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(8, 16),
        strides=(2,),
    ),
    "BasicUNet": made_of(
        "monai.networks.nets",
        "BasicUNet",
        _image(1, 32, 32),
        spatial_dims=2,
        features=(8, 8, 16, 16, 32, 8),
    ),
    "SegResNet": made_of(
        "monai.networks.nets",
        "SegResNet",
        _image(1, 32, 32),
        spatial_dims=2,
        init_filters=8,
        blocks_down=(1, 1),
        blocks_up=(1,),
    ),
    "DynUNet": made_of(
        "monai.networks.nets",
        "DynUNet",
        _image(1, 32, 32),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(8, 16, 32),
        deep_supervision=True,
        deep_supr_num=1,
    ),
    "UNETR": made_of(
        "monai.networks.nets",
        "UNETR",
        _image(1, 32, 32),
        1,
        2,
        (32, 32),
        spatial_dims=2,
        feature_size=8,
        hidden_size=48,
        mlp_dim=64,
        num_heads=4,
    ),
    "SwinUNETR": made_of(
        "monai.networks.nets",
        "SwinUNETR",
        _image(1, 64, 64),
        in_channels=1,
        out_channels=2,
        spatial_dims=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
    ),
    "DenseNet": made_of(
        "monai.networks.nets",
        "DenseNet",
        _image(1, 32, 32),
        spatial_dims=2,
        in_channels=1,
        out_channels=3,
        init_features=8,
        growth_rate=8,
        block_config=(2, 2),
    ),
    "VNet": made_of("monai.networks.nets", "VNet", _image(1, 32, 32), spatial_dims=2),
    "ViT": made_of(
        "monai.networks.nets",
        "ViT",
        _image(1, 32, 32),
        1,
        (32, 32),
        (8, 8),
        hidden_size=32,
        mlp_dim=48,
        num_layers=2,
        num_heads=4,
        spatial_dims=2,
    ),
}


def _x_transformer(layers: str, **options: Any) -> Callable[[], Subject]:
    def find() -> Subject:
        library = imported("x_transformers")

        def make() -> nn.Module:
            stack = getattr(library, layers)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
            return library.TransformerWrapper(
                num_tokens=99, max_seq_len=32, attn_layers=stack
            ).train()

        return Subject(
            make=make, sample=lambda seed: (whole(seed, 99, BATCH, 16),), loss_fn=mean_square
        )

    return find


_X_TRANSFORMERS: dict[str, Callable[[], Subject]] = {
    "decoder": _x_transformer("Decoder"),
    "encoder": _x_transformer("Encoder"),
    "flash": _x_transformer("Decoder", attn_flash=True),
    "rotary, swiglu, rmsnorm": _x_transformer(
        "Decoder", rotary_pos_emb=True, ff_swish=True, ff_glu=True, use_rmsnorm=True
    ),
    "alibi": _x_transformer("Decoder", alibi_pos_bias=True, alibi_num_heads=2),
    "t5 bias": _x_transformer("Decoder", rel_pos_bias=True),
    "layer dropout": _x_transformer("Decoder", layer_dropout=0.1),
    "talking heads": _x_transformer("Encoder", attn_pre_talking_heads=True),
    "top-k attention": _x_transformer("Decoder", attn_sparse_topk=4),
    "shift tokens": _x_transformer("Decoder", shift_tokens=1),
    "macaron, sandwich norm": _x_transformer("Encoder", macaron=True, sandwich_norm=True),
    "hyper connections": _x_transformer("Decoder", num_residual_streams=2),
}


def _grouped() -> dict[str, Callable[[], Subject]]:
    groups = {
        "diffusers": DIFFUSERS,
        "torch_geometric": _PYG,
        "monai": _MONAI,
        "x_transformers": _X_TRANSFORMERS,
        "timm": TIMM,
        "setups": setups.SETUPS,
    }
    return {
        f"{group}/{name}": find for group, found in groups.items() for name, find in found.items()
    }


SUBJECTS: dict[str, Callable[[], Subject]] = _grouped()
"""By group and name."""
