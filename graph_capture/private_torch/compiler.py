"""What ``torch.compile`` partitions and compiles with; each is imported when it is asked for."""

from __future__ import annotations

from typing import Any


def functorch_config() -> Any:
    """``torch._functorch.config``, which holds ``activation_memory_budget``; 2.11+."""
    import torch._functorch.config

    return torch._functorch.config


def functorch_partitioners() -> Any:
    """``torch._functorch.partitioners``: the min-cut partitioner of a joint graph; 2.11+."""
    import torch._functorch.partitioners

    return torch._functorch.partitioners


def inductor_config() -> Any:
    """``torch._inductor.config``, which holds ``fallback_random``: draws as eager's; 2.11+."""
    import torch._inductor.config

    return torch._inductor.config


def forget_compiled_code() -> None:
    """``torch._dynamo.reset()``: no compiled code of the process is left; 2.11+."""
    import torch._dynamo

    torch._dynamo.reset()


__all__ = [
    "forget_compiled_code",
    "functorch_config",
    "functorch_partitioners",
    "inductor_config",
]
