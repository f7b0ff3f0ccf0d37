"""The other tools in a comparison, by name. Read this first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .checkpointing import (
    by_transformers,
    per_block,
    per_block_saving_matmuls,
)
from .compiled import (
    compile_backend,
    compile_peer,
)
from .module_program import by_module_program
from .peer import (
    PEER_ERRORS,
    Peer,
    Ready,
    Situation,
    blocks_of,
)
from .segments import sqrt_segments

__all__ = [
    "PEERS",
    "COMPILE_BUDGETS",
    "Peer",
    "Ready",
    "Situation",
    "compile_peer",
    "compile_backend",
    "blocks_of",
    "PEER_ERRORS",
]

COMPILE_BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
"""The activation memory budgets in :data:`PEERS`."""

_CHECKPOINT = "torch.utils.checkpoint.checkpoint(use_reentrant=False)"

_ALL = (
    Peer(
        name="checkpoint_per_block",
        summary="each block's input saved, every block recomputed",
        source=_CHECKPOINT,
        prepare=per_block,
    ),
    Peer(
        name="checkpoint_sqrt",
        summary="inputs of sqrt(L) segments of blocks saved; all segments but the last recomputed",
        source=f"{_CHECKPOINT}, in segments as checkpoint_sequential cuts them",
        prepare=sqrt_segments,
    ),
    Peer(
        name="gradient_checkpointing_enable",
        summary="each layer's input saved, every layer recomputed, by Transformers' own switch",
        source="transformers.PreTrainedModel.gradient_checkpointing_enable",
        prepare=by_transformers,
    ),
    Peer(
        name="sac_save_matmuls",
        summary="blocks' inputs and outputs of matrix products saved, the rest recomputed",
        source="torch.utils.checkpoint.create_selective_checkpoint_contexts",
        prepare=per_block_saving_matmuls,
    ),
    Peer(
        name="sac_ilp",
        summary="modules and their operators as PyTorch's own integer program chooses, by budget",
        source="torch.distributed._tools.sac_ilp.sac_milp",
        prepare=by_module_program,
        needs_budget=True,
    ),
    *(compile_peer(budget) for budget in COMPILE_BUDGETS),
)

PEERS: Mapping[str, Peer] = MappingProxyType({peer.name: peer for peer in _ALL})
"""The tools that PyTorch's users have today, by name."""
