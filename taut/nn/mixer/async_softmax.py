"""Asynchronised softmax attention: partial sums under one preset maximum, which need not wait for one another.

Source: Hong et al., FlashDecoding++: Faster Large Language Model Inference on GPUs, 2023, arXiv:2311.01282, section 3;
    of section 4 the arithmetic of flat products, which `taut/ops/_dispatch.py` runs and chooses (section 5).
Differs: the preset maximum lies at the calibrated interval's upper end, so that exponentials stay at most about 1 (the
    paper's choice, the lower end, lets them reach e^23, beyond float16). Only the rows that leave the interval are
    computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from taut.ops.async_attention import async_attention as async_attention_op


class Window(NamedTuple):
    """Scores in [low, high] are safe; `phi` is subtracted from them before the exponential."""

    low: float
    high: float
    phi: float


def calibrate(scores: Iterable[Tensor], coverage: float = 0.9999, margin: float = 0.1) -> Window:
    """The interval that holds the middle `coverage` of all finite scores, widened by `margin` of its width at either
    end. Raises ValueError where its width could leave float32's range (exponentials below e^-80)."""
    values = torch.cat([s[s.isfinite()].flatten() for s in scores]).double().sort().values
    outside = int(len(values) * (1 - coverage) / 2)
    low, high = values[outside].item(), values[-1 - outside].item()
    low, high = low - margin * (high - low), high + margin * (high - low)
    if high - low > 80:
        raise ValueError(f"scores spread over {high - low:.0f}; no one maximum serves them, use ordinary attention")
    return Window(low, high, high)


def async_attention(
    q: Tensor, k: Tensor, v: Tensor, window: Window, *, mask: Tensor | None = None, splits: int = 4
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v for q [batch, heads, M, d], k [batch, heads, N, d], v [batch, heads, N, dv], the keys
    cut into `splits` parts; see the op.

    `mask`: bool [..., M, N], True where a query may look. Returns the output and, bool [batch, heads, M], which rows
    left the window and were computed by ordinary softmax instead.
    """
    return async_attention_op(q, k, v, *window, mask=mask, splits=splits)


def flat_intensity(rows: int, k: int, tile_n: int) -> float:
    """Multiply-adds per loaded value of one column tile: rises with the tile, while `flat_parallelism` falls."""
    return 2 * rows * k / (k + rows * k / tile_n + rows)


def flat_parallelism(n: int, tile_n: int) -> int:
    """Blocks that run at a time when only the columns are shared out."""
    return math.ceil(n / tile_n)
