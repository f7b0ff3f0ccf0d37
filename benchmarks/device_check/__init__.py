"""Compare predictions with what a device does: bits, peaks, times, peers. See ``docs/gpu.md``.

``make gpu-check`` or ``python -m benchmarks.device_check --help``. Without a CUDA device
it runs on the CPU, with smaller versions of the same models. Not part of the wheel: run
it from a checkout.
"""
