"""The one tolerance of these tests: at most twice the error of plain code in the same dtype, plus one ulp."""

from __future__ import annotations

import torch
from torch import Tensor


def error(y: Tensor, truth: Tensor) -> float:
    """Relative, over the whole tensor."""
    y, truth = y.detach().double(), truth.detach()
    return float((y - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def as_accurate(got: Tensor, plain: Tensor, truth: Tensor) -> bool:
    """Whether `got` errs at most twice as much against float64's `truth` as `plain`, of the same dtype, plus an ulp."""
    assert got.shape == plain.shape == truth.shape
    assert got.dtype == plain.dtype
    assert truth.dtype == torch.float64
    return error(got, truth) <= 2 * error(plain, truth) + torch.finfo(got.dtype).eps
