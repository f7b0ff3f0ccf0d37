"""What several checks of private names try them on."""

from __future__ import annotations

from typing import Any

import torch

from graph_capture.private_torch import (
    dispatch,
)

ADD = torch.ops.aten.add.Tensor


class Heard(dispatch.TorchDispatchMode):
    """Notes the operators that run under it, and the modes that are active then."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))
