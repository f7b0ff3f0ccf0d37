"""Where in a user's model the calls of a step come from."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..lines import is_machinery
from ..private_torch.autograd import current_node, next_sequence_number, sequence_number_of


class CallPlaces:
    """Knows the module that runs, and the line of code.

    Parameters
    ----------
    current_node
        Returns the autograd node that is being differentiated.
    """

    def __init__(self, current_node: Callable[[], Any] = current_node) -> None:
        self._current_node = current_node
        self._modules: list[str] = [""]
        self._of_sequence: dict[int, tuple[str, str]] = {}

    @property
    def module_path(self) -> str:
        """The innermost submodule that runs."""
        return self._modules[-1]

    def origin(self, phase: str) -> tuple[str, str]:
        """Return module path and source line; a backward call has those of its forward call."""
        current = self._current_node()
        if phase == "backward" and current is not None:
            return self._of_sequence.get(sequence_number_of(current), ("", ""))
        origin = (self.module_path, calling_line())
        self._of_sequence[next_sequence_number() - 1] = origin
        return origin

    @contextmanager
    def inside_modules(
        self, model: nn.Module, at_each: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """While active, calls know the submodule that they run in.

        Parameters
        ----------
        at_each
            Is called before a module runs and after it.
        """
        path_of = {id(m): name for name, m in model.named_modules()}
        mine = threading.get_ident()  # modules of other threads may run meanwhile

        def enter(module: nn.Module, _args: Any) -> None:
            if threading.get_ident() != mine:
                return
            at_each()
            self._modules.append(path_of.get(id(module), self.module_path))

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            if threading.get_ident() != mine:
                return
            at_each()
            self._modules.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def calling_line() -> str:
    """Return the innermost line of code that is neither PyTorch's nor this project's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not is_machinery(name):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown line"
