"""PyTorch's own integer program over modules: ``torch.distributed._tools``.

Each is imported when it is asked for. None of it is imported by PyTorch itself.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def module_program() -> Any:
    """``sac_ilp``: ``sac_milp`` and the policy of one module; 2.11+, needs PuLP."""
    from torch.distributed._tools import sac_ilp

    return sac_ilp


def module_statistics() -> Any:
    """``ilp_utils``: ``aggregate_stats`` and ``parse_module_info``, the program's data; 2.11+."""
    from torch.distributed._tools import ilp_utils

    return ilp_utils


def memory_tracker() -> Any:
    """A ``MemTracker``: what each module of a step holds, by kind; 2.11+.

    Its own fails at frozen parameters, on which it puts hooks for their gradients.
    """
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.utils.hooks import RemovableHandle

    class Tracker(MemTracker):
        def _track_module_params_and_buffers(self, module: Any, *args: Any, **named: Any) -> Any:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    none = RemovableHandle(OrderedDict()), RemovableHandle(OrderedDict())
                    self._param_to_grad_hook_handles.setdefault(parameter, none)
            return super()._track_module_params_and_buffers(module, *args, **named)

    return Tracker()


def operator_statistics(timed: Any) -> Any:
    """A ``SACEstimator``, on for a forward pass on tensors of any kind; 2.11+.

    ``timed(func, args, kwargs)`` returns a call's result and milliseconds; its own two ways to
    time calls need CUDA and a fake mode.
    """
    from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP, SACEstimator
    from torch.utils._python_dispatch import TorchDispatchMode

    class Estimator(SACEstimator):
        def __enter__(self) -> Any:
            """Begin as its own does, without asking for a fake mode."""
            self._mod_tracker.register_user_hooks(
                pre_fw_hook=self._pre_fw_hook, post_fw_hook=self._post_fw_hook
            )
            self._mod_tracker.__enter__()
            self._saved_tensor_hook_ctx.__enter__()
            return TorchDispatchMode.__enter__(self)

        def _post_fw_hook(self, mod: Any, inputs: Any, outputs: Any) -> None:
            """Pass over modules that call nothing, at which its own fails."""
            found = self._sac_mod_metadata.get(self._mod_tracker.get_known_fqn(mod))
            counted = [] if found is None else found.sac_metadata
            if found is None or any(one.func not in OPS_TO_ALWAYS_SKIP for one in counted):
                super()._post_fw_hook(mod, inputs, outputs)

    estimator = Estimator()
    estimator._estimate_runtime = timed
    return estimator


def never_counted() -> Any:
    """``OPS_TO_ALWAYS_SKIP``: calls that have no place among a module's operators; 2.11+."""
    from torch.distributed._tools.sac_estimator import OPS_TO_ALWAYS_SKIP

    return OPS_TO_ALWAYS_SKIP


@contextmanager
def fitting_by(fit: type) -> Iterator[None]:
    """Let ``SACEstimator`` fit its curves by a class of ours in place of pwlf's; 2.11+.

    It imports ``pwlf`` for ``PiecewiseLinFit`` when it fits; that package minimizes by an
    unseeded random search.
    """
    module = ModuleType("pwlf")
    module.PiecewiseLinFit = fit  # type: ignore[attr-defined]
    before = sys.modules.get("pwlf")
    sys.modules["pwlf"] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules["pwlf"]
        else:
            sys.modules["pwlf"] = before


__all__ = [
    "fitting_by",
    "memory_tracker",
    "module_program",
    "module_statistics",
    "never_counted",
    "operator_statistics",
]
