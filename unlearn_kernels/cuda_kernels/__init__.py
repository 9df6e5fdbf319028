"""Launchers of the CUDA C++ kernels in csrc/cuda. Nothing here is imported before a kernel is needed."""
