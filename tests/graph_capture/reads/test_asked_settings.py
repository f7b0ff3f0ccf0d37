"""Settings of Python, PyTorch and NumPy that forward asks for are compared."""

from __future__ import annotations

import decimal
import gc
import locale
import logging
import sys
import warnings
from collections.abc import Callable
from os import environ, getenv
from typing import Any

import numpy as np
import pytest
import torch

from .asking import Asks, assert_found

Patch = pytest.MonkeyPatch

LOG = logging.getLogger("tests.asked")

BACKENDS = torch.backends.flags_frozen.__globals__


def _from_here(model: Any) -> float:
    import sys as system

    return float(len(system.argv))


WAYS: dict[str, tuple[Callable[[Any], float], Callable[[Asks, Patch], Any]]] = {
    "number of threads": (
        lambda model: float(torch.get_num_threads()),
        lambda model, patch: torch.set_num_threads(torch.get_num_threads() + 1),
    ),
    "matmul precision": (
        lambda model: float(len(torch.get_float32_matmul_precision())),
        lambda model, patch: torch.set_float32_matmul_precision("high"),
    ),
    "initial seed": (
        lambda model: float(torch.initial_seed() % 7),
        lambda model, patch: torch.manual_seed(torch.initial_seed() + 1),
    ),
    "torch.backends": (
        lambda model: float(torch.backends.cudnn.benchmark),
        lambda model, patch: (
            # PyTorch's own tests forbid it for the rest of a process.
            patch.setitem(BACKENDS, "__allow_nonbracketed_mutation_flag", True),
            patch.setattr(torch.backends.cudnn, "benchmark", True),
        ),
    ),
    "default device": (
        lambda model: float(torch.get_default_device().type == "meta"),
        lambda model, patch: torch.set_default_device("meta"),
    ),
    "warn only": (
        lambda model: float(torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda model, patch: (
            torch.use_deterministic_algorithms(False, warn_only=True)
            or torch.use_deterministic_algorithms(True, warn_only=True)
        ),
    ),
    "level of a logger": (
        lambda model: float(LOG.isEnabledFor(logging.DEBUG)),
        lambda model, patch: (
            patch.setattr(LOG, "level", logging.DEBUG) or LOG.manager._clear_cache()
        ),
    ),
    "attribute of a logger": (
        lambda model: float(LOG.level),
        lambda model, patch: patch.setattr(LOG, "level", logging.DEBUG),
    ),
    "decimal's context": (
        lambda model: float(decimal.Decimal(1) / decimal.Decimal(3)),
        lambda model, patch: patch.setattr(decimal.getcontext(), "prec", 3),
    ),
    "sys.argv": (
        lambda model: float(len(sys.argv)),
        lambda model, patch: patch.setattr(sys, "argv", ["one", "two", "three", "four"] * 9),
    ),
    "sys.argv by a local import": (
        _from_here,
        lambda model, patch: patch.setattr(sys, "argv", ["one", "two", "three", "four"] * 9),
    ),
    "sys.modules": (
        lambda model: float("no_such_file" in sys.modules),
        lambda model, patch: patch.setitem(sys.modules, "no_such_file", sys),
    ),
    "environ by its name": (
        lambda model: float(environ.get("ASKED", 1)),
        lambda model, patch: patch.setenv("ASKED", "3"),
    ),
    "getenv by its name": (
        lambda model: float(getenv("ASKED", "1")),
        lambda model, patch: patch.setenv("ASKED", "3"),
    ),
    "filters of warnings": (
        lambda model: float(len(warnings.filters)),
        lambda model, patch: patch.setattr(warnings, "filters", warnings.filters[1:]),
    ),
    "locale": (
        lambda model: float(locale.setlocale(locale.LC_NUMERIC) == "C"),
        lambda model, patch: locale.setlocale(locale.LC_NUMERIC, "C.UTF-8"),
    ),
    "NumPy's settings": (
        lambda model: float(np.geterr()["over"] == "raise"),
        lambda model, patch: np.seterr(over="raise"),
    ),
    "garbage collection": (
        lambda model: float(gc.isenabled()),
        lambda model, patch: gc.disable(),
    ),
    "anomaly detection": (
        lambda model: float(torch.is_anomaly_enabled()),
        lambda model, patch: torch.autograd.set_detect_anomaly(True),
    ),
}


@pytest.fixture(autouse=True)
def _settings() -> Any:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    errors, deterministic = np.geterr(), torch.are_deterministic_algorithms_enabled()
    number = locale.setlocale(locale.LC_NUMERIC)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(deterministic)
    torch.autograd.set_detect_anomaly(False)
    np.seterr(**errors)
    locale.setlocale(locale.LC_NUMERIC, number)
    gc.enable()
    LOG.manager._clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", WAYS)
def test_another_answer_is_found(name: str, monkeypatch: Patch) -> None:
    """Before the quick comparison is made, and by it."""
    assert_found(*WAYS[name], monkeypatch, _undo)


def _undo() -> None:
    torch.set_default_device(None)
    torch.autograd.set_detect_anomaly(False)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    np.seterr(over="warn")
    gc.enable()
    locale.setlocale(locale.LC_NUMERIC, "C")
    LOG.manager._clear_cache()  # type: ignore[attr-defined]
