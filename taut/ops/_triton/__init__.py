"""Triton kernels behind the ops, and what stands between a tensor and them. Imported at the first use only."""
