"""The choices that PyTorch would make on an absent CUDA GPU.

A few functions look at the card before they choose which operator to dispatch:
attention (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``), batch
normalization (``Normalization.cpp``), recurrent networks (``RNN.cpp``), sampling
on a grid (``GridSampler.cpp``) and the layout of a convolution's output
(``Convolution.cpp``). Without the card they choose as for a plain tensor. This
module makes the choices for the card that a step is captured for, as torch 2.11 to
2.13 make them in builds for CUDA 13.

What cannot be known here:

- builds for CUDA 12 come with a cuDNN older than 9.15.1 (torch 2.11 for CUDA 13
  comes with 9.19), for which PyTorch does not prefer cuDNN's attention on Hopper
  and Blackwell. A plan made here does not fit there, and applying it says so.
  ``torch.nn.attention.sdpa_kernel`` settles the choice in both places;
- the decisions of builds for ROCm are only known for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..costs.devices import Device
from ..costs.target import Target
from ..errors import CaptureError, NotFittingError
from ..private_torch.devices import suggest_memory_format
from ..private_torch.operators import has_kernel, temporary_library
from ..private_torch.replacing import CONVOLUTION_LAYOUT
from .attention import AMD, attention_as_on

aten = torch.ops.aten

# Functions that autograd takes apart if there is no kernel, but not on CUDA: all those that have a
# composite implementation beside a CUDA kernel (torch 2.11 to 2.14).
ONE_KERNEL_ON_CUDA = ("_fused_rms_norm", "mish_backward", "silu_backward")


@contextmanager
def dispatch_as_on(target: Target) -> Iterator[None]:
    """While active, CUDA tensors are dispatched as they would be on ``target``.

    The kernels are registered at autograd's key, where composite functions are taken
    apart. This covers every way of calling a function, and comes after autocast.
    """
    choices: dict[str, Callable[..., Any]] = {
        "scaled_dot_product_attention": partial(attention_as_on, target.device),
        "batch_norm": partial(_batch_norm, target.device),
        "grid_sampler": _grid_sampler,
    }
    if torch.backends.cudnn.enabled:
        choices |= {
            f"{kind}.{form}": partial(_runs_in_cudnn, f"torch.{kind}")
            for kind in _RNNS
            for form in _FORMS
        }
    with ExitStack() as stack:
        library = stack.enter_context(temporary_library("aten", "IMPL"))
        for name, choice in choices.items():
            library.impl(name, choice, "AutogradCUDA")
        for name in ONE_KERNEL_ON_CUDA:
            if not has_kernel(f"aten::{name}", "CUDA"):
                library.impl(name, partial(_never_runs, name), "CUDA")
        stack.enter_context(_layouts_of_cudnn())
        yield


def _never_runs(name: str, *_args: Any, **_kwargs: Any) -> Any:
    raise CaptureError(f"aten::{name} was called on CUDA tensors, of which there are none here")


# -- batch normalization and convolution -------------------------------------------------


def _batch_norm(
    device: Device,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """``_batch_norm_impl_index``: cuDNN's kernel where it can be used."""
    if device.name in AMD:
        raise _on_rocm("batch_norm", device)
    statistics = (running_mean is None) == (running_var is None)
    if (
        cudnn_enabled
        and input.dtype != torch.bfloat16
        and weight is not None
        and bias is not None
        and weight.dtype != torch.bfloat16
        and (input.dtype != torch.float16 or weight.dtype == torch.float32)
        and statistics
        and (running_mean is not None or training)
        and input.dim() >= 3
        and input.size(0) <= (880_801 if training else 65_535)
    ):
        others = [
            t if t is None else t.contiguous() for t in (weight, bias, running_mean, running_var)
        ]
        dense = input.contiguous(memory_format=suggest_memory_format(input))
        return aten.cudnn_batch_norm(dense, *others, training, momentum, eps)[0]
    return aten.batch_norm.default.decompose(  # without cuDNN there is no choice
        input, weight, bias, running_mean, running_var, training, momentum, eps, False
    )


def _grid_sampler(
    input: torch.Tensor,
    grid: torch.Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> torch.Tensor:
    """``GridSampler.cpp``, ``grid_sampler``: cuDNN's kernel, whose outputs are not known here."""
    if (
        torch.backends.cudnn.enabled
        and interpolation_mode == padding_mode == 0  # bilinear, zeros
        and align_corners
        and input.dtype in (torch.float16, torch.float32, torch.float64)
        and input.dim() == 4
        and input.size(1) <= 1024
    ):
        _runs_in_cudnn("grid_sample with align_corners=True")
    return aten.grid_sampler.default.decompose(
        input, grid, interpolation_mode, padding_mode, align_corners
    )


@contextmanager
def _layouts_of_cudnn() -> Iterator[None]:
    """While active, convolutions of CUDA tensors have the layout that cuDNN gives them."""
    own = CONVOLUTION_LAYOUT.value

    def layout(input: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
        on_cudnn = torch.backends.cudnn.enabled and input.dtype != torch.float64
        if input.device.type != "cuda" or not on_cudnn:
            return own(input, weight, backend)
        last = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
        suggested = {suggest_memory_format(input), suggest_memory_format(weight)}
        return last if last in suggested else torch.contiguous_format

    with CONVOLUTION_LAYOUT.holding(layout):
        yield


# -- what runs in cuDNN -------------------------------------------------------------------

_RNNS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_FORMS = ("input", "data")


def refuse_recurrent(model: nn.Module) -> None:
    """Refuse a recurrent network, which would run in cuDNN.

    Raises
    ------
    NotFittingError
        Names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and torch.backends.cudnn.enabled:
            _runs_in_cudnn(f"module {name!r}, a {type(module).__name__},")


def _runs_in_cudnn(what: str, *_args: Any, **_kwargs: Any) -> Any:
    raise NotFittingError(
        f"{what} runs in cuDNN on a CUDA card, which cannot be captured without that card: capture "
        "on the device, plan the part of the model around it, or train with "
        "torch.backends.cudnn.enabled = False"
    )


def _on_rocm(name: str, device: Device) -> CaptureError:
    return NotFittingError(
        f"which kernel {name} runs in on {device.name} is not known here: capture on the device"
    )
