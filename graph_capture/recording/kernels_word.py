"""Ask the real kernel for its results if PyTorch's fake kernel refuses the arguments.

``_grouped_mm`` on the CPU multiplies float32, but its fake kernel accepts bfloat16
only. A library that sees this error falls back on another way, with other bits. So
PyTorch's own call is run once on made-up arguments, for the shapes of its results.
"""

from __future__ import annotations

from typing import Any

import torch

from ..costs.trial import REFUSALS, as_in_a_step, blank_arguments, is_safe
from ..private_torch.aten import ctc_loss_backward, unsafe_view
from ..private_torch.dispatch import disable_current_modes
from ..private_torch.fake_tensors import FakeTensor
from ..private_torch.operators import schema_of
from ..private_torch.trees import tree_flatten, tree_iter, tree_unflatten


def kernels_word(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return stand-ins of a call's results; ``None`` if its kernel cannot be asked or refuses, too.

    Must be called under the mode of the stand-ins.
    """
    if func.namespace != "aten" or schema_of(func).is_mutable or not is_safe(func):
        return None
    if any(r.alias_info is not None for r in schema_of(func).returns):
        return None
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in given} - {torch.device("cpu")} or {torch.device("cpu")}
    if not given or len(devices) != 1 or not any(isinstance(t, FakeTensor) for t in given):
        return None
    (device,) = devices
    if device.type != "cpu" and not torch.cuda.is_available():
        return None
    with disable_current_modes(), as_in_a_step(device):
        try:
            made_args, made_kwargs = blank_arguments(func, args, kwargs, device)
            made = func(*made_args, **made_kwargs)
        except REFUSALS:
            return None
    leaves, spec = tree_flatten(made)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return None
    return tree_unflatten(
        [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in leaves],
        spec,
    )


def laid_out_rightly(func: Any, args: tuple, out: Any) -> Any:
    """The result of a call, with the kernel's strides if those of the stand-in differ."""
    if func in _VIEWS and 1 in out.shape:
        return _as_meta_views(args[0], out)
    if func not in _CONTIGUOUS or out.is_contiguous():
        return out
    return torch.empty(out.shape, dtype=out.dtype, device=out.device)


def _as_meta_views(tensor: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """``view`` with the strides that PyTorch gives a dimension of one element.

    Such a stride moves no data, but kernels use it to choose the memory format of their result.
    """
    with disable_current_modes():
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        stride = like.view(view.shape).stride()
    if stride == view.stride():
        return view
    return tensor.as_strided(view.shape, stride, view.storage_offset())


# Their stand-ins are computed in Python, by another rule.
_VIEWS = {torch.ops.aten.view.default, unsafe_view.default}

# Contiguous for any strides of their arguments (aten/src/ATen/native/LossCTC.cpp).
_CONTIGUOUS = {
    ctc_loss_backward.default,
    ctc_loss_backward.Tensor,
}


__all__ = ["kernels_word", "laid_out_rightly"]
