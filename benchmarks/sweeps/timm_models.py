"""Models of timm, one of each family, at one block a stage where the family can be so small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .building import BATCH, imported, normal
from .subject import Subject, mean_square

_SMALLEST: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"depths": (1, 1, 1)},
    {"depth": (1, 1, 1)},
    {},
)
_DROPPING: tuple[dict[str, Any], ...] = (
    {"drop_rate": 0.1, "drop_path_rate": 0.1},
    {"drop_rate": 0.1},
    {},
)

NAMES = (
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_zepto_rms",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "csatv2",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "gmlp_ti16_224",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "mambaout_femto",
    "maxvit_pico_rw_256",
    "mnasnet_small",
    "mobilenetv3_small_050",
    "mobileone_s1",
    "mobilevit_xxs",
    "naflexvit_base_patch16_parfac_gap",
    "pit_ti_224",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "sam2_hiera_tiny",
    "vit_tiny_patch16_dinov3_qkvb",
)


def _made(name: str) -> nn.Module:
    """The smallest of a family, with as much dropping as it knows."""
    timm = imported("timm")
    refused: Exception | None = None
    for options in ({**small, **drops} for small in _SMALLEST for drops in _DROPPING):
        try:
            model: nn.Module = timm.create_model(name, num_classes=10, **options)
        except Exception as error:  # noqa: BLE001  an option that the family does not have
            refused = error
        else:
            return model.train()
    raise ValueError(f"timm builds no {name}") from refused


def _subject(name: str) -> Callable[[], Subject]:
    def find() -> Subject:
        asked = imported("timm").get_pretrained_cfg(name)
        side = asked.input_size[-1]
        if not asked.fixed_input_size:
            side = 64 if side <= 256 else 96
        return Subject(
            make=lambda: _made(name),
            sample=lambda seed: (normal(seed, BATCH, 3, side, side),),
            loss_fn=mean_square,
        )

    return find


TIMM: dict[str, Callable[[], Subject]] = {name: _subject(name) for name in NAMES}
"""By timm's name."""
