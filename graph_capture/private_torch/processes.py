"""What the processes of a job share besides collectives."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def default_store() -> Any:
    """The key-value store that the default process group met through; 2.11+."""
    return dist.distributed_c10d._get_default_store()


__all__ = ["default_store"]
