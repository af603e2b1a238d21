from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: what statistics are computed in."""
    return x if x.dtype == torch.float64 else x.float()
