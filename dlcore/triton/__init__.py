"""Kernels for GPUs, one module per family; Triton itself is imported when one of them is first called."""
