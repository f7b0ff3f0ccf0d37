"""Operators whose names PyTorch begins with an underscore: what its public functions come to."""

from __future__ import annotations

import torch

# 2.11+; a check that runs where its argument lies
assert_async = torch.ops.aten._assert_async
# 2.11+; ctc_loss, whose lengths are numbers in tensors
ctc_loss = torch.ops.aten._ctc_loss
# 2.11+; its backward
ctc_loss_backward = torch.ops.aten._ctc_loss_backward
# 2.11+; what x[i] += y comes to, in place
index_put_impl = torch.ops.aten._index_put_impl_
# 2.11+; what .item() comes to
local_scalar_dense = torch.ops.aten._local_scalar_dense
# 2.11+; pack_padded_sequence, which reads lengths out of memory
pack_padded_sequence = torch.ops.aten._pack_padded_sequence
# 2.11+; what .to() comes to where it copies
to_copy = torch.ops.aten._to_copy
# 2.11+; the view that reshape makes of a copy
unsafe_view = torch.ops.aten._unsafe_view
# 2.11+; scaled_dot_product_attention by cuDNN
attention_in_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
# 2.11+; by flash attention
attention_in_flash = torch.ops.aten._scaled_dot_product_flash_attention
# 2.11+; by the memory-efficient kernel
attention_in_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
# 2.11+; by plain operators
attention_in_math = torch.ops.aten._scaled_dot_product_attention_math

__all__ = [
    "assert_async",
    "attention_in_cudnn",
    "attention_in_efficient",
    "attention_in_flash",
    "attention_in_math",
    "ctc_loss",
    "ctc_loss_backward",
    "index_put_impl",
    "local_scalar_dense",
    "pack_padded_sequence",
    "to_copy",
    "unsafe_view",
]
