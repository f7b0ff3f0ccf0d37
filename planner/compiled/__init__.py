"""Compiled training steps within a byte budget; importing this registers the backend "remat"."""

from .backend import register, remat
from .compiled_plan import CompiledPlan
from .install import install

register()

__all__ = ["CompiledPlan", "install", "remat"]
