"""The profiler behind ``torch.autograd.profiler_legacy``, which hears of every allocation."""

from __future__ import annotations

from torch._C._profiler import _ExperimentalConfig
from torch.autograd import _disable_profiler_legacy, _enable_profiler_legacy

# 2.11+; the last argument that a ProfilerConfig wants, left as it is
ExperimentalConfig = _ExperimentalConfig
# 2.11+; starts to record, in this thread, and writes nothing to stderr
start_legacy_profiler = _enable_profiler_legacy
# 2.11+; ends it; hands out what was recorded
stop_legacy_profiler = _disable_profiler_legacy

__all__ = ["ExperimentalConfig", "start_legacy_profiler", "stop_legacy_profiler"]
