"""Settings of the process that decide which operators and kernels run."""

from __future__ import annotations

import torch

# 2.11+; whether oneDNN may run
onednn_enabled = torch._C._get_mkldnn_enabled
# 2.11+; whether cuDNN may run
cudnn_enabled = torch._C._get_cudnn_enabled
# 2.11+; whether attention may take flash attention
flash_attention_enabled = torch._C._get_flash_sdp_enabled
# 2.11+; whether it may take the memory-efficient kernel
efficient_attention_enabled = torch._C._get_mem_efficient_sdp_enabled
# 2.11+; whether it may take plain operators
math_attention_enabled = torch._C._get_math_sdp_enabled
# 2.11+; whether it may take cuDNN's kernel
cudnn_attention_enabled = torch._C._get_cudnn_sdp_enabled
# 2.11+; the order in which attention tries its kernels
attention_priorities = torch._C._get_sdp_priority_order
# 2.11+; torch.use_deterministic_algorithms
deterministic_algorithms = torch._C._get_deterministic_algorithms

__all__ = [
    "attention_priorities",
    "cudnn_attention_enabled",
    "cudnn_enabled",
    "deterministic_algorithms",
    "efficient_attention_enabled",
    "flash_attention_enabled",
    "math_attention_enabled",
    "onednn_enabled",
]
