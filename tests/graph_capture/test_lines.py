"""Whose line a message names."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

import planner
from graph_capture.lines import is_machinery

TORCH = Path(torch.__file__).parent


def test_pythons_own_files_are_machinery() -> None:
    """A context manager's line says nothing about whoever enters it."""
    assert is_machinery(contextlib.__file__)
    assert not is_machinery(__file__)


def test_pytorchs_files_and_this_projects_are_machinery() -> None:
    """So is code that was generated."""
    files = [str(TORCH / "nn" / "functional.py"), str(planner.__file__), "<string>"]
    assert all(map(is_machinery, files))


def test_what_lies_beside_pytorch_is_a_library() -> None:
    """Their names begin like PyTorch's."""
    assert not is_machinery(str(TORCH.parent / "torch_geometric" / "utils" / "loop.py"))
    assert not is_machinery(str(TORCH.parent / "torchvision" / "ops" / "boxes.py"))
