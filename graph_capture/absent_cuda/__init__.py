"""The choices that PyTorch makes on a CUDA GPU, on a machine without one."""
