"""Process-wide settings that decide which operators a forward runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "oneDNN": torch._C._get_mkldnn_enabled,
    "cuDNN": torch._C._get_cudnn_enabled,
    "flash attention": torch._C._get_flash_sdp_enabled,
    "memory-efficient attention": torch._C._get_mem_efficient_sdp_enabled,
    "attention by plain operators": torch._C._get_math_sdp_enabled,
    "cuDNN attention": torch._C._get_cudnn_sdp_enabled,
    "deterministic algorithms": torch._C._get_deterministic_algorithms,
}


class ProcessWide:
    """Asks PyTorch for them; answers with the same object for as long as nothing changes."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Return the current settings by name."""
        now = {name: ask() for name, ask in _SETTINGS.items()}
        if now != self._held:
            self._held = now
        return self._held


PROCESS_WIDE = ProcessWide()
"""Of this process."""
