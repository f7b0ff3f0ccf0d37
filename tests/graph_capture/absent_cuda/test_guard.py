"""Fake CUDA tensors and autograd in a build of PyTorch that knows no CUDA device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graph_capture.absent_cuda import guard as absent_cuda
from graph_capture.absent_cuda.guard import ensure_cuda_guard
from graph_capture.errors import CaptureError

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")

_SCRIPT = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from graph_capture.absent_cuda.guard import ensure_cuda_guard

def step():
    x = torch.arange(6.0).requires_grad_()
    (x.sin() * x).sum().backward()
    return x.grad

before = step()
ensure_cuda_guard()
ensure_cuda_guard()
with FakeTensorMode():
    w = torch.empty(4, 4, device="cuda:0", requires_grad=True)
    y = (w @ w).relu().sum()
assert y.device.type == "cuda" and y.grad_fn is not None
assert torch.equal(step(), before)
assert not torch.cuda.is_available()
assert torch.cuda.device_count() == 0
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    pass
else:
    raise SystemExit("a real CUDA tensor was made")
print("fine")
"""


@needs_no_cuda
def test_autograd_records_fake_cuda_tensors() -> None:
    """In a fresh process: the guard is there, and CPU work and what CUDA says stay as they were."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr


@needs_no_cuda
def test_other_builds_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the registry of guards cannot be found, the error names a way out."""
    monkeypatch.setattr(absent_cuda, "_REGISTRY", "no_such_symbol")
    with pytest.raises(CaptureError, match="plan with a CUDA build of torch"):
        ensure_cuda_guard()
    monkeypatch.setattr(absent_cuda, "_LIBRARIES", ("none.dll",))
    with pytest.raises(CaptureError, match=r"none\.dll"):
        ensure_cuda_guard()


@needs_no_cuda
def test_a_build_without_the_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The private function of PyTorch that is needed may be gone one day."""
    monkeypatch.delattr(torch._C, "_ensureCUDADeviceGuardSet")
    with pytest.raises(CaptureError, match="_ensureCUDADeviceGuardSet"):
        ensure_cuda_guard()
