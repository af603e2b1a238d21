"""Triton kernels of the decode step: the words of `taut.runtime.steps` on a GPU."""
