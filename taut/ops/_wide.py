"""The dtype in which ops accumulate: float32, or float64 where the input is."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()
