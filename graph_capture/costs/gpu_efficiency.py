"""The share of a GPU's roofline that kernels reach: published measurements and assumptions.

None of these figures was measured by this project. ``benchmarks/calibrate.py``
replaces them where the card is at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

from .operator_classes import (
    ATTENTION,
    CONVOLUTION,
    COPY,
    DEPTHWISE,
    ELEMENTWISE,
    INDEXING,
    MATMUL,
    NORMALIZATION,
    OTHER,
    RANDOM,
    REDUCTION,
)

# One assumption for each kind of kernel, the same for all cards: real shapes are not the best
# ones, and streams do not reach the bandwidth of the data sheet (81 % of it on MI300X, up to
# 90 % on NVIDIA's cards: Ambati et al., "AMD MI300X GPU Performance Analysis", 2025, BabelStream).
_COMPUTE = 0.7
_STREAM = 0.8
_GATHER = 0.4  # rows in no order

ASSUMED: Mapping[str, float] = {
    MATMUL: _COMPUTE,
    CONVOLUTION: 0.5,
    DEPTHWISE: _GATHER,  # bound by traffic, and each input is read for several outputs
    ATTENTION: 0.5,
    ELEMENTWISE: _STREAM,
    NORMALIZATION: _STREAM,
    REDUCTION: _STREAM,
    COPY: _STREAM,
    RANDOM: _STREAM,
    INDEXING: _GATHER,
    OTHER: _GATHER,
}

# Best bfloat16 product in PyTorch over the data sheet's dense peak: S. Bekman, "Machine Learning
# Engineering", Maximum Achievable Matmul FLOPS comparison table (torch 2.5 to 2.7; A100 SXM
# 271.2 of 312, H100 SXM 794.5 of 989, "H200 is the same", B200 1745 of 2250, MI300X 668.4 of
# 1300 TFLOP/s).
_BEST_MATMUL = {"a100": 0.87, "h100": 0.80, "b200": 0.78, "mi300x": 0.51}

# FlashAttention-2, which PyTorch's flash kernels are: 50 to 73 % on A100 (Dao, arXiv 2307.08691),
# 35 % on H100 (Shah et al., arXiv 2407.08608, abstract).
_FLASH_2 = {"a100": 0.6, "h100": 0.35}


def sourced(card: str) -> dict[str, float]:
    """Return :data:`ASSUMED`, with the published figures of a GPU in their place."""
    efficiency = dict(ASSUMED)
    if card in _BEST_MATMUL:
        efficiency[MATMUL] = _BEST_MATMUL[card]
    if card in _FLASH_2:
        efficiency[ATTENTION] = _FLASH_2[card]
    return efficiency
