"""Values with which a call takes its maximal scratch memory, where zeros do not work.

Most kernels take the same memory for all values. Of the others, some refuse zeros: pivots
count from one, probabilities must have a positive sum, and lengths of sequences must be
real ones. Some take memory for what a mask selects: there the mask selects everything, or
as much as there is room for, and no bag of embeddings is empty. The gradient of a product
takes the most if a single factor is zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from ..private_torch.operators import schema_of

_Named = dict[str, Any]
ONE_ZERO = "ones, and a zero"
_Fill = int | str | tuple[int, ...] | Fraction  # a string: ONE_ZERO; a fraction: so many are ones

# Kernels that read memory at places that their arguments name, or another library's packed state.
_NEVER = re.compile(
    r"aten::(.*(quantize|fbgemm|sparse|packed|cudnn|miopen|_rnn|_lstm|_gru|lstm_|gru_).*)"
)
_ALL_THE_SAME = {
    "aten::mkldnn_rnn_layer",
    "aten::mkldnn_rnn_layer_backward",
    "aten::cudnn_batch_norm",
}


def runs_on_blanks(func: Any) -> bool:
    """Whether a call may run on the values made here."""
    from ..calls.formula_operators import PURE

    name = schema_of(func).name
    if name in _ALL_THE_SAME or name in PURE:
        return True
    return func.namespace == "aten" and _NEVER.fullmatch(name) is None


def fills_of(func: Any, args: tuple, kwargs: dict) -> dict[int, _Fill]:
    """By ``id``, the tensors that are not filled with zeros, and the number or numbers to use."""
    names = [a.name for a in schema_of(func).arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    chosen = _FILLS.get(schema_of(func).name.split("::")[1].rstrip("_"))
    found = {} if chosen is None else chosen(given)
    return {
        id(given[name]): fill
        for name, fill in found.items()
        if isinstance(given.get(name), torch.Tensor)
    }


def _pivots(_given: _Named) -> dict[str, _Fill]:
    return {"pivots": 1, "LU_pivots": 1}


def _one_zero(_given: _Named) -> dict[str, _Fill]:
    return {"input": ONE_ZERO}


def _full_bags(_given: _Named) -> dict[str, _Fill]:
    return {"bag_size": 1}


def _probabilities(_given: _Named) -> dict[str, _Fill]:
    return {"self": 1}


def _whole_mask(given: _Named) -> dict[str, _Fill]:
    """All of it; as much as the source, or the source's gradient, holds."""
    if "source" in given:
        room, target = given["source"].numel(), given["self"]
    elif "sizes" in given:
        room, target = math.prod(given["sizes"]), given["grad_output"]
    else:
        return {"mask": 1}
    selected = torch.broadcast_shapes(target.shape, given["mask"].shape).numel()
    return {"mask": Fraction(room, selected) if room < selected else 1}


def _ctc_lengths(given: _Named) -> dict[str, _Fill]:
    """Every sequence as long as it can be: no longer than what forward kept has room for."""
    log_probs, targets = given["log_probs"], given["targets"]
    batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
    longest = targets.shape[1] if targets.dim() == 2 else targets.numel() // max(1, batch)
    if "log_alpha" in given:  # a column for each target and for each blank around them
        longest = min(longest, (given["log_alpha"].shape[-1] - 1) // 2)
    return {"input_lengths": log_probs.shape[0], "target_lengths": longest, "targets": 1}


def _segments(given: _Named) -> dict[str, _Fill]:
    """One segment that holds everything; the others are empty."""
    data, lengths = given["data"], given.get("lengths")
    if lengths is None or lengths.dim() != 1:
        return {}
    length = data.shape[given.get("axis", 0)]
    return {"lengths": (length, *(0 for _ in range(lengths.numel() - 1)))}


_FILLS: dict[str, Callable[[_Named], dict[str, _Fill]]] = {
    "lu_unpack": _pivots,
    "linalg_lu_solve": _pivots,
    "linalg_ldl_solve": _pivots,
    "_embedding_bag_backward": _full_bags,
    "_embedding_bag_dense_backward": _full_bags,
    "multinomial": _probabilities,
    "prod_backward": _one_zero,
    "masked_scatter": _whole_mask,
    "masked_scatter_backward": _whole_mask,
    "masked_select": _whole_mask,
    "masked_fill_value_backward": _whole_mask,
    "_ctc_loss": _ctc_lengths,
    "_ctc_loss_backward": _ctc_lengths,
    "segment_reduce": _segments,
    "_segment_reduce_backward": _segments,
}
