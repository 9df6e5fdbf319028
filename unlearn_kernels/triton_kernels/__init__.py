"""Triton kernels, a module per family. Nothing here is imported before a kernel is needed."""
