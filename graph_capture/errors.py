"""Errors of capture, worded for the person whose model it is."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """The model's step cannot be written down as one graph."""


class NotFittingError(CaptureError):
    """The step was traced but is no training step."""
