"""Compiled training steps within a byte budget; importing this makes the backend "remat" known."""

from .backend import register, remat
from .compiled_plan import CompiledPlan
from .install import install

register()

__all__ = ["CompiledPlan", "install", "remat"]
