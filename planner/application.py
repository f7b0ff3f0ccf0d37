"""How a model trained by its plan, by the name that scripts outside this repository know."""

from __future__ import annotations

from .running.attach import applied_plan

__all__ = ["applied_plan"]
