"""Process-wide settings that decide which operators a forward runs, and their kernels' scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..private_torch.settings import (
    cudnn_attention_enabled,
    cudnn_enabled,
    deterministic_algorithms,
    efficient_attention_enabled,
    flash_attention_enabled,
    math_attention_enabled,
    onednn_enabled,
)

NUM_THREADS = "number of threads"
"""The setting that counts on the CPU alone: threads have scratch memory each."""

_SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "oneDNN": onednn_enabled,
    "cuDNN": cudnn_enabled,
    "flash attention": flash_attention_enabled,
    "memory-efficient attention": efficient_attention_enabled,
    "attention by plain operators": math_attention_enabled,
    "cuDNN attention": cudnn_attention_enabled,
    "deterministic algorithms": deterministic_algorithms,
    NUM_THREADS: torch.get_num_threads,
}


class ProcessWide:
    """Asks PyTorch for the settings; returns the same object as long as nothing changes."""

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
"""The settings of this process."""
