"""What lies beneath a tensor."""

from __future__ import annotations

from operator import attrgetter, methodcaller

import torch

# 2.11+; identity of a storage, the same for all who view it, while one of them lives
identity_of_storage = attrgetter("_cdata")
# 2.11+; how often a tensor was written in place
version_of = attrgetter("_version")
# 2.11+; whether a tensor stands for zeros and has no memory
is_zero_tensor = methodcaller("_is_zerotensor")
# 2.11+; a view that negates when it is read, to make the sample of a call negated as the call's
negated_view = torch._neg_view

__all__ = ["identity_of_storage", "is_zero_tensor", "negated_view", "version_of"]
