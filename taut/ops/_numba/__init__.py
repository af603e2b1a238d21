"""Kernels for a CPU, compiled by numba and cached on disk. Tensors come as addresses, their dtypes as scalar tags."""
