"""CUDA C++ kernels of the memory-bound families."""
