"""What runs a planned step, by the name that scripts outside this repository know."""

from __future__ import annotations

from .running.planned_step import PlannedStep

__all__ = ["PlannedStep"]
