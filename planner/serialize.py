"""Plan files as dicts, by the name that scripts outside this repository know."""

from __future__ import annotations

from .saving.serialize import plan_from_dict, plan_to_dict

__all__ = ["plan_from_dict", "plan_to_dict"]
