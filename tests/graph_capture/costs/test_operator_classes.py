"""Classes of operators."""

from __future__ import annotations

import pytest
import torch

from graph_capture.costs.operator_classes import operator_class

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("mm addmm bmm baddbmm _scaled_mm mkldnn_rnn_layer _cudnn_rnn_backward", "matmul"),
        ("convolution convolution_backward cudnn_convolution", "convolution"),
        ("_conv_depthwise2d", "depthwise_convolution"),
        (
            "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention_backward "
            "_scaled_dot_product_efficient_attention _efficient_attention_forward "
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "attention",
        ),
        ("add relu_ gelu gelu_backward silu_backward threshold_backward where", "elementwise"),
        ("native_layer_norm cudnn_batch_norm _softmax _log_softmax_backward_data", "normalization"),
        ("sum mean amax argmax var_mean mse_loss", "reduction"),
        ("clone copy_ _to_copy cat zeros_like fill_ slice_backward constant_pad_nd", "copy"),
        ("bernoulli_ native_dropout native_dropout_backward rand normal_", "random"),
        (
            "embedding embedding_dense_backward index index_put gather scatter_add "
            "nll_loss_forward nll_loss_backward",
            "indexing",
        ),
        ("max_pool2d_with_indices upsample_bilinear2d topk sort", "other"),
    ],
)
def test_operators_fall_into_their_classes(names: str, expected: str) -> None:
    """The operators that training steps are made of, by name."""
    for name in names.split():
        packet = getattr(aten, name)
        func = getattr(packet, packet.overloads()[0])
        assert operator_class(func) == expected, name


def test_a_maximum_of_two_tensors_is_no_reduction() -> None:
    """``max.other`` shares its name with a reduction and goes element by element."""
    assert operator_class(aten.maximum.default) == "elementwise"
    assert operator_class(aten.max.dim) == "reduction"


def test_a_depthwise_convolution_is_told_by_its_weight() -> None:
    """One filter a channel is another class than one group or several channels a group."""

    def class_of(channels_per_group: int, groups: int) -> str:
        x = torch.empty(1, 8, 4, 4, device="meta")
        weight = torch.empty(8, channels_per_group, 3, 3, device="meta")
        args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups)
        return operator_class(aten.convolution.default, args)

    assert class_of(1, 8) == "depthwise_convolution"
    assert class_of(4, 2) == "convolution"
    assert class_of(8, 1) == "convolution"
