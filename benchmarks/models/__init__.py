"""Models of the literature in three sizes, with samples: what comparisons and benchmarks train.

``SUBJECTS[name](size)`` gives a :class:`Subject`. Weights are random; nothing is downloaded.
"""

from .registry import SUBJECTS
from .subject import Size, Subject, WithLoss

__all__ = ["SUBJECTS", "Size", "Subject", "WithLoss"]
