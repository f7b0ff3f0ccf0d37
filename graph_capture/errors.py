"""Errors of capture, written for the model's author."""

from __future__ import annotations

from .printable import printable


class CaptureError(RuntimeError):
    """The model's step cannot be captured as one graph."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, lines=True))


class UnknownValueError(CaptureError):
    """The step's code asks for a value of a tensor that nobody knows."""


class AskedInBackwardError(UnknownValueError):
    """Code that runs in the backward pass asks for a value of a gradient."""


class NotFittingError(CaptureError):
    """The step was traced but is not a training step."""
