"""ScaleNorm: projection to a sphere of one trained radius.

Source: Nguyen and Salazar, Transformers without Tears, 2019, arXiv:1910.05895.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from taut.nn.norm._precision import wide


class ScaleNorm(nn.Module):
    """y = weight * x / max(||x||, eps) over the last axis, for x [..., d]; the scalar weight starts at sqrt(d)."""

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.tensor(float(d)).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        a = wide(x)
        return (a * (wide(self.weight) / a.norm(dim=-1, keepdim=True).clamp(min=self.eps))).to(x.dtype)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield ScaleNorm(24), (make(2, 3, 24),)
