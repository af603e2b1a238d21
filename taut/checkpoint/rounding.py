"""Round float64 once.

`round_once` is the reference, in torch. torch converts double to bfloat16 and float16 by way of float32, which rounds
twice; going through float32 *rounded to odd* makes the second rounding correct, because float32 carries at least two
more bits than either, in their subnormal range too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CODES = (torch.int8, torch.uint8)
"""Integers that a rewrite computes: they come as whole numbers in range and are not rounded at all."""


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor in `dtype`: a floating one, to nearest, ties to even, rounded once; or codes, which must fit.

    Raises TypeError for other dtypes, and ValueError for codes that are not whole or out of range.
    """
    if x.dtype is not torch.float64:
        raise TypeError(f"round_once takes float64, not {x.dtype}")
    if dtype in CODES:
        if not torch.equal(x.to(dtype).double(), x):
            raise ValueError(f"codes that are no {str(dtype).removeprefix('torch.')}")
        return x.to(dtype)
    if dtype not in FLOATS:
        raise TypeError(f"round_once cannot round to {dtype}")
    return x.to(dtype) if dtype in (torch.float64, torch.float32) else _to_odd(x).to(dtype)


def _to_odd(x: Tensor) -> Tensor:
    """float64 to float32: exact values stay, others take the neighbour whose last bit is odd."""
    near = x.to(torch.float32)
    away = near.double().abs() > x.abs()
    toward_zero = torch.where(away, torch.nextafter(near, torch.zeros_like(near)), near)
    inexact = (near.double() != x) & ~x.isnan()
    return torch.where(inexact, (toward_zero.view(torch.int32) | 1).view(torch.float32), near)


@dataclass(frozen=True)
class Lost:
    """How many nonzero values left a dtype's normal range: to infinity, or from normal to subnormal or zero."""

    overflow: int = 0
    underflow: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.overflow + other.overflow, self.underflow + other.underflow)

    def reason(self, dtype: torch.dtype) -> str | None:
        """Why values of this dtype must not be written, or None. Underflow counts for float16 alone.

        float16 becomes subnormal at 6e-5, where weights live; the other dtypes at 1e-38, where they do not.
        """
        underflow = self.underflow if dtype is torch.float16 else 0
        parts = [f"{self.overflow} overflow"] * bool(self.overflow)
        parts += [f"{underflow} become subnormal or zero"] * bool(underflow)
        return f"in {str(dtype).removeprefix('torch.')} {' and '.join(parts)}" if parts else None


def lost(before: Tensor | None, exact: Tensor, after: Tensor) -> Lost:
    """What rounding `exact` (float64) to `after` lost; `before` are the original values, None for a new tensor."""
    if after.dtype in CODES:
        return Lost()
    tiny = torch.finfo(after.dtype).tiny
    overflow = (after.isinf() & exact.isfinite()).sum()
    was_normal = True if before is None else before.double().abs() >= tiny
    underflow = ((after.double().abs() < tiny) & (exact != 0) & was_normal).sum()
    return Lost(int(overflow), int(underflow))
