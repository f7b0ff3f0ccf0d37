"""Turn a model and a sample into a cost graph: what a training step computes and what it costs.

Names that need torch are imported on first use, so that the solvers can work with
cost graphs without loading it.
"""

from typing import TYPE_CHECKING, Any

from .cost_graph import CostGraph, Operator, Storage

if TYPE_CHECKING:
    from .captured_step import CapturedStep
    from .errors import CaptureError
    from .loop.loss import LossSource
    from .step_capture import capture, capture_step

_LAZY = {
    "CapturedStep": "captured_step",
    "capture": "step_capture",
    "capture_step": "step_capture",
    "CaptureError": "errors",
    "LossSource": "loop.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


__all__ = [
    "CaptureError",
    "CapturedStep",
    "CostGraph",
    "LossSource",
    "Operator",
    "Storage",
    "capture",
    "capture_step",
]
