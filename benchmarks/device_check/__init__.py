"""Predictions beside what a device does: bits, peaks, times, peers. Read ``docs/gpu.md``.

``make gpu-check`` or ``python -m benchmarks.device_check --help``. Without a
CUDA device the CPU is the device, on smaller versions of the same models. Not
part of the wheel: run from the checkout.
"""
