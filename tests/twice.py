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


def surplus(got: Tensor, nearest: Tensor, truth: Tensor) -> float:
    """The least relative error that numbers must have for them to round to `got`, values of a grid: 0 if each of these
    is as near to the truth as `nearest`, to which float64 rounds."""
    got, nearest = ((t.detach().double() - truth).abs() for t in (got, nearest))
    return float(((got - nearest) / 2 / truth.abs()).nan_to_num(0, 0, 0).max())


def rounded_as_accurately(got: Tensor, nearest: Tensor, truth: Tensor, plain: Tensor) -> bool:
    """Whether `got` may come of rounding numbers that err at most twice as much as `plain`, plain code's before it
    rounds, plus an ulp. The error of `got` itself, which is the grid's, would hide truncation in place of rounding."""
    assert got.shape == nearest.shape == truth.shape == plain.shape
    return surplus(got, nearest, truth) <= 2 * worst(plain, truth) + torch.finfo(plain.dtype).eps


def worst(y: Tensor, truth: Tensor) -> float:
    """Largest relative error of a number."""
    return float(((y.detach().double() - truth) / truth).abs().nan_to_num(0, 0, 0).max())
